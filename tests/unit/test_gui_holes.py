"""Ways out of a run's folder and of the roots: links, paths that are read in two ways, requests that are none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gui_page import client, made, place, preview, step
from PIL import Image

from whitetuner.errors import UserError
from whitetuner.gui import data_page, forms
from whitetuner.gui.document import changed
from whitetuner.gui.form_api import FormApi
from whitetuner.gui.pickers import Roots
from whitetuner.gui.training_tabs import Tab, tabs
from whitetuner.runs.report import write_report
from whitetuner.runs.state import machine_secret

__all__ = ["place"]  # the fixture

TAB = "flux2-klein-t2i"
JSON = {"content-type": "application/json"}
LINKS = pytest.mark.skipif(os.name == "nt", reason="links need a right of their own there")


@LINKS
def test_links_out_of_a_run_are_neither_sent_nor_listed_nor_read(place: Path) -> None:
    run = place / "output" / "cat"
    secret = place / "secret.safetensors"
    secret.write_bytes(b"nobody's business")
    picture = place / "outside.png"
    Image.new("RGB", (64, 64), (255, 0, 0)).save(picture)
    inside = run / "samples" / "own.png"
    job = made(run, step(1), preview(run, 1, "samples/own.png", "samples/link.png", "../../outside.png"))
    inside.parent.mkdir()
    Image.new("RGB", (64, 64), (0, 255, 0)).save(inside)
    (run / "samples" / "link.png").symlink_to(picture)
    (run / "final").mkdir()
    (run / "final" / "cat.safetensors").symlink_to(secret)
    (run / "final" / "gone.safetensors").symlink_to(place / "gone")
    (run / "logs").mkdir()
    (run / "logs" / "x.log").symlink_to(secret)
    job = job.with_(log=str(run / "logs" / "x.log"), exit=1)
    job.write()
    page = client()
    shown = page.get(f"/api/runs/{job.id}").json()
    assert shown["finals"] == [] and "nobody" not in shown["reason"]["text"]
    assert page.get(f"/api/runs/{job.id}/final/0").status_code == 404
    assert "nobody" not in page.get(f"/api/runs/{job.id}/log").text
    assert "refused" in page.post(f"/api/runs/{job.id}/comfyui", json={"folder": str(place)}).json()
    text = write_report(run).read_text(encoding="utf-8")
    assert text.count("data:image/jpeg") == 1 and "cat.safetensors" not in text
    (run / "final" / "cat.safetensors").unlink()
    (run / "final" / "cat.safetensors").write_bytes(b"own")
    answer = page.get(f"/api/runs/{job.id}/final/0")
    assert answer.content == b"own" and 'filename="cat.safetensors"' in answer.headers["content-disposition"]


@LINKS
def test_nothing_is_copied_through_a_link_out_of_the_roots(place: Path) -> None:
    run, away = place / "in" / "cat", place / "away"
    job = made(run)
    (run / "final").mkdir()
    (run / "final" / "cat.safetensors").write_bytes(b"new")
    (away / "loras").mkdir(parents=True)
    for name, link, target in (("a", "models", away), ("b", "models/loras", away / "loras")):
        at = place / "in" / name / link
        at.parent.mkdir(parents=True)
        at.symlink_to(target)
        page = client(server=True, roots=(place / "in",))
        answer = page.post(f"/api/runs/{job.id}/comfyui", json={"folder": str(place / "in" / name)})
        assert "refused" in answer.json() and list((away / "loras").iterdir()) == []
    left = place / "in" / "c" / "models" / "loras"
    left.mkdir(parents=True)
    (left / ".cat.safetensors.writing").symlink_to(away / "written.safetensors")
    assert "path" in page.post(f"/api/runs/{job.id}/comfyui", json={"folder": str(place / "in/c")}).json()
    assert not (away / "written.safetensors").exists() and (left / "cat.safetensors").read_bytes() == b"new"


def test_a_confined_page_does_not_tell_where_comfyui_is_elsewhere(place: Path) -> None:
    job = made(place / "in" / "cat")
    (place / "state").mkdir(exist_ok=True)
    (place / "state" / "comfyui.txt").write_text(str(place / "ComfyUI"), encoding="utf-8")
    address = f"/api/runs/{job.id}"
    assert client().get(address).json()["comfyui"] == str(place / "ComfyUI")
    assert client(server=True, roots=(place / "in",)).get(address).json()["comfyui"] == ""
    assert client(server=True, roots=(place,)).get(address).json()["comfyui"] == str(place / "ComfyUI")


#: What no page of ours sends: wrong kinds, half characters, numbers of thousands of digits, brackets without end.
ODD: tuple[Any, ...] = (True, -1, 1e308, "\ud800", "9" * 5000, [[]], {"a": 1}, ["x", -1])
ROUTES = (
    "/api/start",
    *(f"/api/form/{TAB}/{word}" for word in FormApi.VERBS),
    *(f"/api/data/{word}" for word in ("look", "caption", "undo", "write", "writing")),
    "/api/path/list",
)
FIELDS = ("tab", "text", "changes", "add", "remove", "name", "vram", "goal", "look", "folder")


@pytest.mark.parametrize("address", ROUTES)
def test_no_odd_value_breaks_a_route(place: Path, address: str) -> None:
    page = client()
    for field in FIELDS:
        for value in ODD:
            body = {"tab": TAB, "text": "", "existing": "", field: value}
            answer = page.post(address, content=json.dumps(body), headers=JSON)
            assert answer.status_code < 500, (field, value, answer.text)
            answer.json()


def test_what_is_no_json_is_answered(place: Path) -> None:
    page = client()
    job = made(place / "output" / "cat")
    for address in (
        *ROUTES,
        *(f"/api/runs/{job.id}/{word}" for word in ("ask", "resume", "comfyui", "strengths")),
    ):
        for content in (b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b"1" * 5000):
            answer = page.post(address, content=content, headers=JSON)
            assert answer.status_code < 500, (address, content[:9], answer.text)
            assert "refused" in answer.json() or answer.status_code == 404


def test_a_list_is_changed_by_its_rows_alone(place: Path) -> None:
    page = client()
    for body in (
        {"changes": {"data.sets": "x"}},
        {"changes": {"data.sets.repeats": 2}},
        {"changes": {"data.sets[99999].repeats": 2}},
        {"remove": ["data.sets", -1]},
        {"remove": ["run", 0]},
        {"add": "run"},
    ):
        answer = page.post(f"/api/form/{TAB}/change", json={"text": "[run]\nname = 'a'\n", **body}).json()
        assert answer["text"] == "[run]\nname = 'a'\n", body
    torn = "data = 5\n"
    answer = page.post(f"/api/form/{TAB}/change", json={"text": torn, "changes": {"data.images": "x"}}).json()
    assert answer["text"] == torn and "where a table belongs" in str(answer["errors"])


def test_numbers_in_addresses_are_numbers(place: Path) -> None:
    page = client()
    job = made(place / "output" / "cat")
    for word in ("-1", "9" * 5000, "1e3", "\u0661", "x"):
        for address in (f"final/{word}", f"strength/{word}", f"preview/{word}/0", f"preview/0/{word}"):
            assert page.get(f"/api/runs/{job.id}/{address}").status_code == 404
    assert page.get("/api/tensorboard?folder=" + "9" * 5000).status_code == 200


def test_a_run_in_a_folder_that_is_no_utf8_is_shown(place: Path) -> None:
    job = made(place / os.fsdecode(b"caf\xe9") / "cat")
    listed = client().get("/api/runs").json()
    assert job.id in str(listed)
    assert client().get(f"/api/runs/{job.id}").status_code == 200


def test_a_start_on_no_device_is_refused_before_anything_is_written(place: Path) -> None:
    text = '[run]\nname = "cat"\n'
    for gpus in ("0; rm", "--now", "GPU"):
        answer = (
            client().post("/api/start", json={"tab": TAB, "text": text, "gpus": gpus, "existing": ""}).json()
        )
        assert "no such device" in str(answer)
    assert not (place / "output").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_leaves_no_half_picture(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = place / "a.txt"
    real = Path.open

    def opened(path: Path, mode: str) -> Any:
        path.touch()
        return real(Path("/dev/full"), "wb")

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(UserError, match="cannot be written"):
        data_page._add(target, b"x" * 100)
    assert not target.exists()


@pytest.mark.skipif(os.name == "nt", reason="rights are other ones there")
def test_the_secret_is_the_users_own_from_its_first_moment(place: Path) -> None:
    before = os.umask(0)
    try:
        assert machine_secret() == machine_secret()
    finally:
        os.umask(before)
    assert (place / "state" / "secret").stat().st_mode & 0o777 == 0o600
    assert [one.name for one in (place / "state").iterdir()] == ["secret"]


@pytest.mark.parametrize("tab", tabs(), ids=lambda tab: tab.key)
def test_no_path_of_the_schema_leads_out_of_the_roots(place: Path, tab: Tab) -> None:
    inside = place / "in"
    inside.mkdir()
    roots = Roots.of([inside])
    source = {"edit": ("target", "conditions"), "i2v": ("videos",), "t2v": ("videos",)}.get(
        tab.tasks[0], ("images",)
    )
    given = {"model.path": inside, "run.output_dir": inside, **{f"data.{one}": inside for one in source}}
    listed = forms.fields_of(tab, forms.fresh(tab))
    fields = {one.key: one for field in listed for one in (field, *field.rows)}
    base = changed(forms.fresh(tab), fields, {key: str(path) for key, path in given.items()})
    forms.to_train(base, tab, roots)
    keys = [field.key for field in listed if field.wants]
    keys += [f"{f.key}[0].{one.key.rpartition('.')[2]}" for f in listed for one in f.rows if one.wants]
    assert len(keys) > 10
    for key in keys:
        text = changed(base, fields, {key: str(place / "elsewhere")})
        assert "elsewhere" in text
        with pytest.raises(UserError):
            forms.to_train(text, tab, roots)
