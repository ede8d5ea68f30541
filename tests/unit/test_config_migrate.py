"""Configs of earlier versions: read in today's words, told, rewritten with their comments; those of newer ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from whitetuner.cli import main
from whitetuner.config.document import parse
from whitetuner.config.load import dump_config, load_config
from whitetuner.config.migrate import CHANGES, FORMAT, Change, refuse_newer, rewritten, stamped, today
from whitetuner.config.options import options_of
from whitetuner.config.resume import check_resume
from whitetuner.config.told import field_of, keys_of
from whitetuner.errors import UserError
from whitetuner.gui import forms

#: What a version to come might have changed: another name in its table, in every row, into another table, gone, other values.
MADE_UP = (
    *CHANGES,
    Change("run.count", "run.steps", "steps are counted"),
    Change("data.sets.times", "data.sets.repeats", "as other trainers say"),
    Change("data.half", "memory.dtype", "it is a matter of memory", values={True: "bf16", False: "fp32"}),
    Change("log.colour", None, "the terminal tells"),
    Change("model.options.style", "model.options.variant", "one word", only={"model.family": "qwen-image"}),
)
OLD = """# mine
[run]
count = 300  # enough for ten pictures
name = "a"

[model]
family = "flux2-klein"
[model.options]
variant = "base" # of 4B

[data]
half = true # my card is old
images = 'a "b"\\c'

[[data.sets]]
images = "x"
times = 3 # few of them

[[data.sets]]
images = "y"

[log]
# loud
colour = true
console_every = 5
"""


def test_every_kind_of_change_is_made_and_told() -> None:
    before = parse(OLD, "OLD")
    values, moved = today(before, MADE_UP)
    assert values["run"] == {"steps": 300, "name": "a"}
    assert values["model"] == {"family": "flux2-klein", "options": {"variant": "auto"}}
    assert values["data"] == {
        "images": 'a "b"\\c',
        "sets": [{"images": "x", "repeats": 3}, {"images": "y"}],
    }
    assert values["memory"] == {"dtype": "bf16"} and values["log"] == {"console_every": 5}
    assert [str(one) for one in moved] == [
        'model.options.variant = "base" is now "auto": the folder tells base 4B from base 9B',
        "run.count is now run.steps: steps are counted",
        "data.sets[0].times is now data.sets[0].repeats: as other trainers say",
        'data.half is now memory.dtype = "bf16": it is a matter of memory',
        "log.colour is gone and was left out: the terminal tells",
    ]
    assert before == parse(OLD, "OLD")  # the document itself stays as it was
    assert today(values, MADE_UP) == (values, [])


def test_a_file_is_rewritten_with_its_comments() -> None:
    text, moved = rewritten(OLD, MADE_UP)
    assert len(moved) == 5
    assert parse(text, "new") == {"format": FORMAT + 5, **today(parse(OLD, "OLD"), MADE_UP)[0]}
    for comment in (
        "# mine",
        "# enough for ten pictures",
        "# of 4B",
        "# my card is old",
        "# few of them",
        "# loud",
    ):
        assert comment in text, comment
    assert text.startswith(
        f"# mine\nformat = {FORMAT + 5}\n\n[run]\nsteps = 300  # enough for ten pictures\n"
    )
    assert rewritten(text, MADE_UP) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        'run = {count = 3, name = "a"}\nmodel = {family = "qwen-image", options = {style = "edit"}}\n',
        'run.count = 3\nrun.name = "a"\nmodel.family = "qwen-image"\nmodel.options.style = "edit" # s\n',
        '[run]\n"count" = 3\nname = "a"\n[model]\nfamily = "qwen-image"\noptions.style = "edit"\n[data]\nhalf = false\n',
        '[model]\nfamily = "qwen-image"\n[run]\nname = "a"\ncount = 3\n[model.options]\nstyle = """\nedit"""\n',
    ],
)
def test_however_the_toml_is_written_the_new_file_says_the_same(text: str) -> None:
    values, moved = today(parse(text, "old"), MADE_UP)
    new, again = rewritten(text, MADE_UP)
    assert moved == again and len(moved) >= 2
    assert parse(new, "new") == {"format": FORMAT + 5, **values}
    assert values["run"] == {"steps": 3, "name": "a"}


def test_an_option_by_both_its_names_is_refused() -> None:
    with pytest.raises(UserError, match=r"run.count and run.steps are one option") as caught:
        today({"run": {"count": 1, "steps": 2}}, MADE_UP)
    assert caught.value.mend == "leave run.count out"


@pytest.mark.parametrize("value", [{}, [], None, {"x": 1}, "base", 3])
def test_what_is_no_table_or_no_old_value_is_left_to_the_schema(value: Any) -> None:
    for document in (
        {"run": value, "data": {"sets": value}, "model": value},
        {"model": {"family": "flux2-klein", "options": {"variant": [value]}}, "log": [value]},
    ):
        assert today(document, MADE_UP) == (document, [])


def test_a_newer_config_is_refused_in_words(tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    config.write_text(f'format = {FORMAT + 1}\n[model]\nfamily = "x"\n[new]\nthing = 1\n', encoding="utf-8")
    with pytest.raises(UserError, match=f"newer White Tuner: it has format {FORMAT + 1}") as caught:
        load_config(config)
    assert str(config) in caught.value.where and "git pull" in caught.value.mend
    for wrong in ("2", 1.0, True, 0, -1, None):
        with pytest.raises(UserError, match="no format of a config"):
            refuse_newer(wrong, "format")


def test_the_earlier_variant_of_klein_is_read_wherever_it_is_said(tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    text = '[model]\nfamily = "flux2-klein"\n[data]\nimages = "a"\n'
    config.write_text(text + '[model.options]\nvariant = "base"\n', encoding="utf-8")
    found = load_config(config)
    assert found.config.model.options == {"variant": "auto"}
    assert found.notes == (
        'model.options.variant = "base" is now "auto": the folder tells base 4B from base 9B',
    )
    assert found.origins["model.options.variant"] == "a.toml line 6"
    config.write_text(text, encoding="utf-8")
    assert load_config(config).notes == ()
    for given in (
        load_config(config, ["model.options.variant=base"]),
        load_config(None, base={"model.family": "flux2-klein", "model.options.variant": "base"}),
        forms.loaded(text + '[model.options]\nvariant = "base"\n'),
    ):
        assert given.config.model.options == {"variant": "auto"} and len(given.notes) == 1
    with pytest.raises(UserError):  # of another family it is a mistake as any other
        load_config(None, base={"model.family": "qwen-image", "model.options.variant": "base"})


def test_unknown_options_are_still_refused_with_the_nearest_name(tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    config.write_text('format = 1\n[model]\nfamily = "flux2-klein"\n[run]\nstep = 3\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"no option 'run.step'") as caught:
        load_config(config)
    assert caught.value.mend == "did you mean run.steps?"


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.key)
def test_a_change_is_known_by_itself(change: Change) -> None:
    """So that it may be made wherever it is seen: the old name is none of today's, the old value is refused today."""
    known = set(keys_of(load_config(None, base={"model.family": "flux2-klein"}).config.__class__))
    if change.to != change.key:
        assert change.key not in known
        return
    assert change.values
    for old, new in change.values.items():
        if change.key.startswith("model.options."):
            name = change.key.removeprefix("model.options.")
            with pytest.raises(ValidationError):
                options_of(change.only["model.family"], {name: old})
            options_of(change.only["model.family"], {name: new})
        else:
            assert field_of(change.key) is not None
            with pytest.raises(UserError):
                load_config(None, base={"model.family": "flux2-klein", change.key: old})


def test_what_is_written_carries_the_format(tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    assert main(["init", "nano-lokr", "-o", str(config)]) == 0
    text = config.read_text(encoding="utf-8")
    assert parse(text, "my")["format"] == FORMAT and text.startswith("#")
    assert rewritten(text) == (text, [])
    written = dump_config(load_config(config).config)
    assert written.startswith(f"format = {FORMAT}\n")
    (tmp_path / "again.toml").write_text(written, encoding="utf-8")
    assert load_config(tmp_path / "again.toml").config == load_config(config).config
    assert forms.loaded(written).config == load_config(config).config
    assert stamped("format = 1\n[a]\n") == f"format = {FORMAT}\n[a]\n"
    assert stamped("") == f"format = {FORMAT}\n"


def test_check_rewrites_the_file_and_keeps_the_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "a.toml"
    old = b'# mine\r\n[model]\r\nfamily = "flux2-klein" # small\r\noptions = {variant = "base"}\r\n[data]\r\nimages = "none"\r\n'
    config.write_bytes(old)
    assert main(["check", "--no-model", str(config)]) == 2  # there are no pictures
    assert config.read_bytes() == old
    assert "`check --migrate` rewrites the file" in capsys.readouterr().out
    assert main(["check", "--no-model", "--migrate", str(config)]) == 2
    told = capsys.readouterr().out
    assert 'a.toml: model.options.variant = "base" is now "auto"' in told
    assert "a.toml is rewritten (kept: a.toml.bak)" in told
    assert (tmp_path / "a.toml.bak").read_bytes() == old
    new = config.read_bytes()
    assert new.count(b"\r\n") == new.count(b"\n") and b"# small" in new and b"# mine" in new
    assert load_config(config).notes == ()
    assert main(["check", "--no-model", "--migrate", str(config)]) == 2
    assert "nothing to rewrite" in capsys.readouterr().out
    assert config.read_bytes() == new
    assert sorted(path.name for path in tmp_path.glob("a*")) == ["a.toml", "a.toml.bak"]
    assert main(["check", "--migrate", str(tmp_path)]) == 2
    assert "no config to rewrite" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on() -> None:
    """Its checkpoint lacks the options that came later, and says what was renamed in its own words."""
    now = load_config(
        None,
        base={
            "model.family": "flux2-klein",
            "data.sets": [{"images": "a", "clips": "head"}],
            "run.name": "a",
        },
    )
    before = now.document()
    before["model"]["options"] = {"variant": "base"}
    for key in (
        "noise.min_snr_gamma",
        "memory.micro_batch",
        "method.precision",
        "data.clips",
        "optimizer.betas",
    ):
        section, name = key.split(".")
        del before[section][name]
    for row in before["data"]["sets"]:
        del row["frames_fps"]
    auto = load_config(None, base={**now.document(), "model.options.variant": "base"})
    assert check_resume(before, auto.config) == []
    later = load_config(
        None, base={**now.document(), "model.options.variant": "auto", "noise.min_snr_gamma": 3.0}
    )
    with pytest.raises(UserError, match=r"5.0 when the run began, 3.0 now"):
        check_resume(before, later.config)
