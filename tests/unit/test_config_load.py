"""File, form and command line give the same Config; every mistake is told with where and how to mend it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whitetuner.config.landed import not_landed, refuse_not_landed
from whitetuner.config.load import Loaded, dump_config, flat, load_config, preset_text, presets
from whitetuner.config.resume import check_resume
from whitetuner.config.schema import Config
from whitetuner.errors import UserError

SMALL = '[model]\nfamily = "flux2-klein"\npath = "m"\n[data]\nimages = "pictures"\n'


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> Loaded:
    path = tmp_path / "c.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


def told(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.code == 2
    return str(caught.value)


CHANGES = {
    "run.seed": 7,
    "run.steps": 12,
    "run.name": "a b 猫",
    "data.resolution": [512, 768],
    "data.trigger": 'say "x"',
    "method.targets": ["transformer_blocks.*"],
    "noise.shift": "auto",
    "optimizer.lr": 3e-5,
    "optimizer.betas": [0.8, 0.99],
    "memory.gradient_checkpointing": True,
    "model.options.max_sequence_length": 64,
}


def test_form_file_and_command_line_give_the_same_config(tmp_path: Path) -> None:
    """E12."""
    base = {"model.family": "flux2-klein", "model.path": "m", "data.images": "pictures"}
    form = load_config(None, base={**base, **CHANGES}).config
    (tmp_path / "form.toml").write_text(dump_config(form), encoding="utf-8")
    file = load_config(tmp_path / "form.toml").config
    line = load(tmp_path, SMALL, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in CHANGES.items())).config
    assert form == file == line
    assert form.model_options().max_sequence_length == 64


@settings(max_examples=40, deadline=None)
@given(
    name=st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters='<>:"/\\|?*.'), min_size=1).map(str.strip).filter(bool),
    trigger=st.text(st.characters(blacklist_categories=("Cs",))),
    lr=st.floats(1e-9, 1.0, allow_nan=False),
    seed=st.integers(0, 2**63 - 1),
    text=st.text(st.characters(blacklist_categories=("Cs",))),
)
def test_a_written_config_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, name: str, trigger: str, lr: float, seed: int, text: str
) -> None:
    config = load_config(
        None,
        base={
            "model.family": "flux2-klein",
            "run": {"name": name, "seed": seed},
            "data": {"images": "p", "trigger": trigger},
            "optimizer.lr": lr,
            "preview.prompts": [{"text": text}],
        },
    ).config
    path = tmp_path_factory.mktemp("c") / "c.toml"
    path.write_text(dump_config(config), encoding="utf-8", newline="\n")
    assert load_config(path).config == config


def test_the_later_source_wins_and_is_named(tmp_path: Path) -> None:
    loaded = load(tmp_path, SMALL + "[optimizer]\nlr = 2e-4\neps = 1e-7\n", "optimizer.lr=3e-4")
    assert loaded.config.optimizer.lr == 3e-4 and loaded.origins["optimizer.lr"] == "--set"
    assert loaded.origins["optimizer.eps"] == "c.toml line 8"
    assert loaded.origins["method.factor"].startswith("family default")
    assert loaded.origins["run.seed"] == "default"


def test_bom_and_crlf_are_read(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode()).config.data.images == "pictures"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (SMALL + '[optimizer]\nlr = "1e-4"\n', ["optimizer.lr", "line 7", "without quotes"]),
        (SMALL + "[optimizer]\nlrr = 1\n", ["optimizer.lrr", "line 7", "did you mean optimizer.lr?"]),
        (SMALL + "[run]\nbatch_size = 2\n", ["run.batch_size", "did you mean data.batch_size?"]),
        (SMALL + "[run]\nsteps = 0\n", ["run.steps", "line 7", "greater than or equal to 1"]),
        (SMALL + "[run]\nsteps = true\n", ["run.steps", "true or false"]),
        (SMALL + "[run]\nsteps = 5\nepochs = 2\n", ["steps or epochs, not both"]),
        (SMALL + '[run]\nname = "a/b"\n', ["run.name", "folder name"]),
        (SMALL.replace("flux2-klein", "flux3"), ["flux3", "flux2-klein"]),
        (SMALL.replace('"pictures"', '"C:\\Users\\me"'), ["line 5", "'C:\\Users\\me'"]),
        (SMALL + "[model.options]\nmax_lenght = 3\n", ["model.options.max_lenght"]),
        (SMALL + "[noise]\nmin_timestep = 900\nmax_timestep = 100\n", ["min_timestep must be below"]),
        ("[data]\nimages = 'x'\n", ["model"]),
        ("a = \n", ["line 1", "not TOML"]),
        (b"[run]\nname = '\xb0\xa1'\n", ["not UTF-8"]),
    ],
)
def test_each_mistake_says_what_where_and_how_to_mend(tmp_path: Path, text: str | bytes, wanted: list[str]) -> None:
    message = told(tmp_path, text)
    assert [one for one in wanted if one not in message] == [], message
    assert "->" in message and "Traceback" not in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = told(tmp_path, SMALL + '[optimizer]\nlr = "1"\nfoo = 1\n[extra]\nx = 1\n')
    assert all(key in message for key in ("optimizer.lr", "optimizer.foo", "extra"))


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "c.toml")
    with pytest.raises(UserError, match="folder"):
        load_config(tmp_path)


def test_a_setting_without_a_value_is_refused(tmp_path: Path) -> None:
    assert "--set section.key=value" in told(tmp_path, SMALL, "optimizer.lr")


def test_sets_take_over_what_data_says_for_all(tmp_path: Path) -> None:
    text = '[model]\nfamily = "flux2-klein"\n[data]\nresolution = 512\ntrigger = "x"\n'
    text += '[[data.sets]]\nimages = "a"\n[[data.sets]]\nimages = "b"\nresolution = 256\nrepeats = 3\n'
    first, second = load(tmp_path, text).config.data_sets()
    assert (first.images, first.resolution, first.trigger, first.repeats) == ("a", 512, "x", 1)
    assert (second.images, second.resolution, second.trigger, second.repeats) == ("b", 256, "x", 3)


def test_no_data_is_an_error_of_the_user(tmp_path: Path) -> None:
    config = load(tmp_path, '[model]\nfamily = "flux2-klein"\n').config
    with pytest.raises(UserError, match="nothing to learn from"):
        config.data_sets()


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_load_and_use_nothing_that_is_not_there(name: str, tmp_path: Path) -> None:
    refuse_not_landed(load(tmp_path, preset_text(name)).config)


def test_what_is_not_there_yet_is_refused_by_name(tmp_path: Path) -> None:
    wishes = {
        "model.task": "edit", "model.transformer_2": "x", "model.image_encoder": "x", "method.kind": "full",
        "memory.vram_gb": 12, "memory.base": "int8", "memory.blocks_to_swap": 3, "memory.activation_offload": True,
        "memory.compile": True, "memory.attention": "flash", "preview.prompts": [{"text": "a", "images": ["x"]}],
        "data.target": "x", "data.conditions": ["x"], "data.condition_resolution": 512, "data.videos": "x",
        "data.num_frames": 5, "data.fps": 16,
    }  # fmt: skip
    assert set(wishes) >= set(not_landed())
    for key in not_landed():
        config = load_config(None, base={"model.family": "flux2-klein", key: wishes[key]}).config
        with pytest.raises(UserError, match="not there yet"):
            refuse_not_landed(config)


def test_on_resume_length_and_rate_may_change_and_the_rest_may_not(tmp_path: Path) -> None:
    before = load(tmp_path, SMALL).document()
    free = load(tmp_path, SMALL, "run.steps=9", "optimizer.lr=1", "save.every=3").config
    assert [line.split(":")[0] for line in check_resume(before, free)] == ["optimizer.lr", "run.steps", "save.every"]
    for change in ("run.seed=1", "method.factor=4", "data.batch_size=2", "noise.shift=2.0", "optimizer.name='adafactor'"):
        with pytest.raises(UserError, match=change.split("=")[0]):
            check_resume(before, load(tmp_path, SMALL, change).config)


def test_every_option_has_a_description_and_every_key_is_documented() -> None:
    def walk(schema: type, prefix: str = "") -> list[str]:
        found = []
        for name, info in schema.model_fields.items():  # type: ignore[attr-defined]
            if not (info.description or hasattr(info.annotation, "model_fields")):
                found.append(prefix + name)
            if hasattr(info.annotation, "model_fields"):
                found += walk(info.annotation, f"{prefix}{name}.")
        return found

    assert walk(Config) == []
    assert flat({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}
