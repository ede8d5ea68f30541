"""The form over its routes: drafts, presets, import, what is still needed, and nothing outside of the roots."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from whitetuner.config.goals import goals
from whitetuner.config.load import load_config
from whitetuner.config.preset import presets
from whitetuner.errors import UserError
from whitetuner.gui import form_api, forms, made, plan_card
from whitetuner.gui.drafts import LARGEST_BYTES, Drafts
from whitetuner.gui.pickers import LISTED, Roots, can_ask, listing
from whitetuner.gui.training_tabs import tab_of, tabs

TAB = "flux2-klein-t2i"


class Form:
    """A client of one tab's routes."""

    def __init__(self, roots: Roots, state: Path, tab: str = TAB, language: str = "en") -> None:
        self.client = TestClient(Starlette(routes=form_api.routes(roots, state)))
        self.tab, self.language, self.state_folder = tab, language, state

    def open(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/api/form/{self.tab}?language={self.language}").json()
        return found

    def post(self, word: str, **body: Any) -> dict[str, Any]:
        path = f"/api/form/{self.tab}/{word}" if word in form_api.FormApi.VERBS else f"/api/path/{word}"
        answer = self.client.post(path, json={"language": self.language, **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def change(self, text: str, **more: Any) -> dict[str, Any]:
        return self.post("change", text=text, **more)


@pytest.fixture
def form(tmp_path: Path) -> Form:
    return Form(Roots.of(None), tmp_path / "state")


def test_a_form_begins_empty_and_says_what_it_needs(form: Form) -> None:
    for tab in tabs():
        opened = Form(Roots.of(None), form.state_folder, tab.key).open()
        state = opened["state"]
        assert not state["errors"] and not state["ok"] and "model.path" in state["needed"]
        assert len(state["needed"]) >= 2
        assert load_config(None, base={"model.family": tab.family}).config.model.family == tab.family


def test_what_is_typed_is_kept_as_a_draft_and_comes_back(form: Form) -> None:
    text = form.open()["state"]["text"]
    answer = form.change(text, changes={"optimizer.lr": "2e-4", "run.steps": "x"})
    assert answer["values"]["optimizer.lr"] == "2e-4" and "run.steps" in answer["errors"]
    again = Form(Roots.of(None), form.state_folder).open()["state"]
    assert again["text"] == answer["text"] and again["values"] == answer["values"]


@pytest.mark.parametrize("language, wrong", [("zh", "不是整数"), ("en", "is not a whole number")])
def test_mistakes_stand_at_their_option_in_the_pages_language(
    tmp_path: Path, language: str, wrong: str
) -> None:
    form = Form(Roots.of(None), tmp_path, language=language)
    text = '[model]\nfamily="flux2-klein"\n[run]\nsteps=1.5\n[data]\nimages="/nowhere"\n[[data.sets]]\nrepeats=0\n'
    errors = form.change(text)["errors"]
    assert wrong in errors["run.steps"][0][0]
    assert "/nowhere" in errors["data.images"][0][0]
    assert errors["data.sets[0].repeats"]
    text = text.replace("repeats=0", "repeats=2")
    assert form.change(text)["errors"]["data"], "two ways of naming the pictures: of the whole section"


@pytest.mark.parametrize(
    "path", ["Qwen/Qwen-Image", "modelscope:Qwen/Qwen-Image", "nowhere:/a", "./nowhere/at"]
)
def test_a_model_may_be_named_as_on_a_hub(form: Form, path: str) -> None:
    state = form.change(f'[model]\nfamily="flux2-klein"\npath="{path}"\n')
    assert ("model.path" in state["errors"]) == ("nowhere" in path)


def test_text_that_is_no_toml_is_told_with_its_line(form: Form) -> None:
    state = form.change('[model]\nfamily = "flux2-klein"\nx = "C:\\dir"\n')
    assert state["broken"] and "line 3" in state["errors"][""][0][0]
    assert "'C:\\dir'" in state["errors"][""][0][1]


def test_a_familys_proposals_are_shown_with_their_source(form: Form) -> None:
    state = form.change('[model]\nfamily="flux2-klein"\n[optimizer]\nname="prodigy"\n')
    assert state["defaults"]["optimizer.lr"] == [
        "1",
        "of prodigy: Mishchenko and Defazio 2023, arXiv 2306.06101",
    ]


@pytest.mark.parametrize("name", presets())
def test_every_preset_belongs_to_one_tab_and_is_without_mistakes_there(tmp_path: Path, name: str) -> None:
    homes = []
    for tab in tabs():
        form = Form(Roots.of(None), tmp_path, tab.key)
        if name in [one for one, _ in form.open()["presets"]]:
            homes.append(tab.key)
            errors = form.post("preset", name=name)["state"]["errors"]
            said = [what for messages in errors.values() for what, _ in messages]
            assert all(what.startswith("there is no f") for what in said), (
                "only the user's own paths are missing"
            )
    assert len(homes) == 1


def test_own_presets_are_kept_offered_and_dropped(form: Form) -> None:
    text = form.change(form.open()["state"]["text"], changes={"run.steps": "7"})["text"]
    kept = form.post("keep_preset", name='my/../猫 "x"', text=text)
    assert kept["name"] == "my猫 x" and kept["own_presets"] == ["my猫 x"]
    assert form.post("preset", name="my猫 x", own=True)["state"]["values"]["run.steps"] == "7"
    assert form.post("drop_preset", name="my猫 x", text=text)["own_presets"] == []
    assert [one.name for one in form.state_folder.rglob("*.toml")] == [f"{TAB}.toml"]


def test_a_goal_after_another_is_that_goal_alone_and_keeps_what_was_set_by_hand(form: Form) -> None:
    fresh = form.change(form.open()["state"]["text"], changes={"noise.min_timestep": "5"})["text"]
    keys = [key for key, _, _ in form.open()["goals"]]
    alone = {key: form.change(fresh, goal=key) for key in keys}
    assert len({str(one["values"]) for one in alone.values()}) > 3
    for first in keys:
        for second in keys:
            after = form.change(alone[first]["text"], goal=second)
            assert not after["errors"] and after["values"] == alone[second]["values"], (first, second)
    by_hand = form.change(alone["character"]["text"], changes={"noise.shift": "4"})["text"]
    assert form.change(by_hand, goal="composition")["values"]["noise.shift"] == "4"


@pytest.mark.parametrize("goal", sorted({one.key for one in goals()}))
def test_a_goal_sets_what_it_says_on_every_tab_that_has_it(tmp_path: Path, goal: str) -> None:
    seen = 0
    for tab in tabs():
        form = Form(Roots.of(None), tmp_path, tab.key)
        before = form.open()
        state = form.change(before["state"]["text"], goal=goal)
        assert not state["errors"]
        if goal in [key for key, _, _ in before["goals"]]:
            (of,) = (one for one in goals(tab.tasks) if one.key == goal)
            wanted = {
                key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in of.values()
            }
            assert {key: state["values"][key] for key in wanted} == wanted
            seen += 1
        else:
            assert state["values"] == before["state"]["values"]
    assert seen


def test_a_config_is_imported_to_the_tab_where_it_belongs(form: Form) -> None:
    for tab in tabs():
        text = f'\ufeff[model]\r\nfamily = "{tab.family}"\r\ntask = "{tab.tasks[0]}"\r\n# kept\r\n'
        answer = form.post("imported", text=text)
        assert answer["tab"] == tab.key and "# kept" in answer["state"]["text"]
        assert Drafts(form.state_folder).draft(tab.key) == answer["state"]["text"]
    assert "TOML" in form.post("imported", text="= broken")["refused"][0][1]


def test_another_familys_config_is_refused_on_a_tab(form: Form) -> None:
    other = next(tab for tab in tabs() if tab.family != "flux2-klein")
    state = form.change(f'[model]\nfamily = "{other.family}"\n')
    assert "this is a config for" in json.dumps(state["errors"])


def test_the_command_says_what_to_type(form: Form) -> None:
    text = form.change(form.open()["state"]["text"], changes={"run.name": "a cat; rm", "run.steps": "5"})[
        "text"
    ]
    found = form.post("command", text=text)
    assert "run.steps=5" in " ".join(found["sets"])
    quoted = form.post("command", text=text.replace("; rm", ""))
    assert (
        quoted["file"] == "a cat.toml"
        and "train" in quoted["run"][1]
        and "'a cat.toml'" in quoted["run"][1].replace('"', "'")
    )


def test_a_run_that_lacks_something_does_not_begin(tmp_path: Path) -> None:
    tab = tab_of(TAB)
    assert tab is not None
    with pytest.raises(UserError, match=r"model\.path"):
        forms.to_train(forms.fresh(tab), tab, Roots.of(None))
    text = '[model]\nfamily = "flux2-klein"\npath = "builtin:nano"\n[data]\nimages = "pictures"\n'
    assert forms.to_train(text, tab, Roots.of(None)).config.model.path == "builtin:nano"
    with pytest.raises(UserError, match="outside"):
        forms.to_train(text, tab, Roots.of([tmp_path]))


@pytest.mark.parametrize(
    "path", ["/etc", "../..", "~", "/proc/self/root/etc", "inside/../../..", "file:///etc"]
)
def test_paths_outside_of_the_roots_are_refused(tmp_path: Path, path: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    roots = Roots.of([inside])
    with pytest.raises(UserError, match="outside"):
        roots.path(path)
    form = Form(roots, tmp_path / "state")
    assert "refused" in form.post("list", path=path)
    state = form.change(f'[model]\nfamily="flux2-klein"\n[data]\nimages={json.dumps(path)}\n')
    assert "outside" in json.dumps(state["errors"]["data.images"])
    assert "refused" in form.post("ask", wants="folder", start="")


def test_a_link_out_of_the_roots_leads_nowhere(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    try:
        (inside / "out").symlink_to(tmp_path / "secret")
    except OSError:
        pytest.skip("links need a right of their own here")
    roots = Roots.of([inside])
    assert listing(roots, str(inside))["folders"] == ["sub"]
    with pytest.raises(UserError, match="outside"):
        roots.path(str(inside / "out"))


def test_a_folder_is_listed_in_the_order_people_count_and_within_bounds(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        (tmp_path / f"cat{number}").mkdir()
    (tmp_path / ".hidden").mkdir()
    for number in range(LISTED + 20):
        (tmp_path / f"p{number}.png").write_bytes(b"")
    found = listing(Roots.of([tmp_path]), str(tmp_path / "cat1" / "not there"))
    assert Path(found["path"]) == tmp_path / "cat1" and found["parent"] == str(tmp_path)
    found = listing(Roots.of([tmp_path]), "")
    assert found["folders"] == ["cat1", "cat2", "cat10"] and found["parent"] is None
    assert found["pictures"] == LISTED + 20 and found["more"] == 23
    assert found["files"][:2] == [["p0.png", 0], ["p1.png", 0]]


def test_no_dialog_is_offered_without_a_desktop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not can_ask()
    assert Form(Roots.of(None, native=True), tmp_path).open()["native"] is False


def test_bodies_that_are_no_forms_are_refused(form: Form) -> None:
    path = f"/api/form/{TAB}/change"
    assert form.client.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert (
        form.client.post(path, content=b"[1]", headers={"content-type": "application/json"}).status_code
        == 400
    )
    assert form.client.get("/api/form/nothing").status_code == 404
    assert "refused" in form.post("change", text="x" * (LARGEST_BYTES + 1))
    assert "refused" in form.post("change", text=5)
    assert "refused" in Form(Roots.of(None), form.state_folder, "no-tab").post("change", text="")


def test_sample_data_is_made_once_by_a_child(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = form.post("make", what="data", text=form.open()["state"]["text"])
    folder = Path(answer["path"])
    assert folder == tmp_path / "output" / "try" / "sample-t2i"
    assert answer["state"]["values"]["data.images"] == str(folder)
    assert answer["state"]["notes"]["data.images"] == "8 pictures, 8 with a .txt caption"
    monkeypatch.setattr(made, "run_word", lambda arguments: pytest.fail("it is there already"))
    assert form.post("make", what="data", text=answer["state"]["text"])["path"] == str(folder)


def test_what_a_child_says_reaches_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no model family 'nothing'"):
        made.run_word(["tiny", "nothing", "x"])


PLAN = {
    "what": "FLUX.2 Klein (x.toml)",
    "shape": "1024x1024, batch 1",
    "steps": 2000,
    "plans": [
        {
            "card": "a card like the RTX 4070",
            "vram_gb": 12.0,
            "machine": {"name": "a card like the RTX 4070", "vram_bytes": 12 << 30, "measured": False},
            "why": "bf16 is taken because it fits at (nearly) full speed",
            "seconds_with_2gb_more": 1.6,
            "choices": [
                {"base": "bf16", "residents": [0, 1, 2], "plain": [], "slots": 2, "blocks": 5, "peak_bytes": 11 << 30,
                 "host_bytes": 9 << 30, "computing_s": 1.8, "seconds": 2.0, "parts": {"activations": 2 << 30, "slots": 1 << 30}},
                {"base": "int8", "residents": [0, 1, 2, 3, 4], "plain": [0], "slots": 2, "blocks": 5, "peak_bytes": 9 << 30,
                 "host_bytes": 3 << 30, "computing_s": 1.85, "seconds": 1.85, "parts": {"activations": 2 << 30}},
            ],
        },
        {"card": "a card like the RTX 4060", "vram_gb": 8.0,
         "refused": "memory.vram_gb: 8.0 GB are too little: at least 9.1 GB are needed (slots 2.00)\n  -> download it again"},
    ],
}  # fmt: skip


def test_the_plan_is_told_in_words_with_its_figures() -> None:
    english, chinese = plan_card.told(PLAN, None, "en"), plan_card.told(PLAN, 12.0, "zh")
    best, other = english["cards"][0]["choices"]
    assert best["title"] == "Recommended" and other["title"] == "Faster"
    assert best["words"] == [
        "bf16 base",
        "2 of 5 blocks wait in host memory",
        "5 of 5 blocks computed again",
        "waiting for weights adds 11 %",
    ]
    assert best["figures"] == [
        "11.0 GB on the card",
        "9 GB of host memory",
        "about 2 s a step",
        "2000 steps: about 67 min",
    ]
    assert best["changes"] == {
        "memory.base": "bf16",
        "memory.blocks_to_swap": "2",
        "memory.gradient_checkpointing": "true",
    }
    assert "memory.gradient_checkpointing" not in other["changes"]
    assert english["cards"][0]["more"] == "2 GB more would save 20 % of the time"
    assert chinese["cards"][0]["name"] == "RTX 4070 一类的显卡" and chinese["cards"][0]["measured"] == "估算"
    assert chinese["cards"][0]["why"] == "选 bf16：放得下，而且（几乎）全速"
    assert "8.0 GB 显存不够：至少要 9.1 GB" in chinese["cards"][1]["refused"]
    assert english["found"] is False and english["sizes"][0] == 8 and english["sizes"][-1] == 32


def test_before_a_model_is_chosen_the_released_one_is_planned_for(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], float | None]] = []
    monkeypatch.setattr(plan_card, "_asked", lambda what, vram: (asked.append((what, vram)), PLAN)[1])
    monkeypatch.setattr(plan_card, "_KEPT", {})
    text = (
        '[model]\nfamily="flux2-klein"\n[model.options]\nvariant="base-9b"\n[data]\nresolution=[512, 768]\n'
    )
    for _ in range(2):
        answer = form.post("plan", text=text, vram=12)
    assert asked == [(["flux2-klein:base-9b", "--task", "t2i", "--size", "768x768"], 12.0)]
    assert answer["released"] and answer["what"] == PLAN["what"]
    whole = text + 'images = "x"\n'
    form.post(
        "plan",
        text=whole.replace('family="flux2-klein"', 'family="flux2-klein"\npath="builtin:nano"'),
        vram=None,
    )
    assert asked[1][0][0].endswith(".toml") and asked[1][1] is None


def test_what_a_plan_proposes_is_a_config(form: Form) -> None:
    for choice in plan_card.told(PLAN, None, "en")["cards"][0]["choices"]:
        state = form.change('[model]\nfamily="flux2-klein"\n', changes=choice["changes"])
        assert not state["errors"]


@pytest.mark.parametrize(
    "seconds, text", [(40, "40 s"), (720, "12 min"), (7200, "2 h"), (4800 * 2, "2 h 40 min")]
)
def test_durations_are_said_as_people_do(seconds: float, text: str) -> None:
    from whitetuner.gui.words import texts

    assert plan_card.duration(seconds, texts("form", "en")) == text


@pytest.mark.skipif(os.name == "nt", reason="file names there are always Unicode")
def test_names_that_are_no_utf8_go_to_the_page_and_come_back(tmp_path: Path, form: Form) -> None:
    folder = tmp_path / os.fsdecode(b"\xc4\xe3")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (folder / os.fsdecode(b"\xba\xc3.png")).touch()
    [name] = form.post("list", path=str(tmp_path))["folders"]
    request = json.dumps({"path": str(tmp_path / name)})  # as a browser writes it: \udcc4
    answer = form.client.post(
        "/api/path/list", content=request, headers={"content-type": "application/json"}
    ).json()
    assert os.fsencode(name) == b"\xc4\xe3" and os.fsencode(answer["files"][0][0]) == b"\xba\xc3.png"


def test_a_config_of_an_earlier_version_is_imported_in_todays_words(form: Form) -> None:
    old = '[model] # mine\nfamily = "flux2-klein"\n[model.options]\nvariant = "base" # 4B\n'
    answer = form.post("imported", text=old, name="old.toml")
    assert answer["moved"] == 1 and answer["left"] == 0
    assert 'variant = "auto" # 4B' in answer["state"]["text"] and "# mine" in answer["state"]["text"]
    assert not answer["state"]["errors"]
    assert form.post("imported", text=answer["state"]["text"], name="new.toml")["moved"] == 0
    newer = form.post("imported", text="format = 99\n" + old, name="newer.toml")
    assert "newer White Tuner" in str(newer)


def test_another_trainers_config_is_imported_into_its_tab(form: Form) -> None:
    job = "config: {name: cats, process: [{model: {arch: zimage, name_or_path: /m}, train: {steps: 7, odd: 1}}]}"
    answer = form.post("imported", text=job, name="job.yaml")
    assert answer["tab"] == "zimage-t2i" and answer["left"] == 1
    assert answer["state"]["values"]["run.steps"] == "7" or answer["state"]["values"]["run.steps"] == 7
    assert "# not carried over: train.odd = 1" in answer["state"]["text"]
    assert "refused" in form.post(
        "imported", text="config: {process: [{model: {arch: sdxl}}]}", name="a.yaml"
    )
    own = form.post("imported", text='[model]\nfamily = "wan"\ntask = "i2v"\n', name="")
    assert own["tab"] == "wan-i2v" and own["left"] == 0
