"""One document behind form, file and command line: they give the same Config (E12), and editing keeps what was written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whitetuner.config.document import parse
from whitetuner.config.load import load_config
from whitetuner.config.preset import preset_text, presets
from whitetuner.config.told import field_of
from whitetuner.errors import UserError
from whitetuner.families.flux2_klein.spec import KleinOptions
from whitetuner.gui.document import changed, set_arguments, shown, typed, values_of, with_row, without_row
from whitetuner.gui.fields import FormField, all_fields
from whitetuner.gui.pickers import cleaned

FIELDS = {one.key: one for field in all_fields()["flux2-klein", "t2i"] for one in (field, *field.rows)}
START = '[model]\nfamily = "flux2-klein"\n'
#: Options that exclude or bound each other; the others are free.
LEFT_OUT = {
    "model.family",
    "model.task",
    "run.epochs",
    "noise.min_timestep",
    "noise.max_timestep",
    "data.target",
    "data.videos",
}
WORDS = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029"),
    min_size=1,
    max_size=12,
)


def control(field: FormField) -> st.SearchStrategy[Any]:
    """What a user may do with a control so that the schema takes it."""
    low, high = field.minimum, field.maximum
    if field.kind == "bool":
        return st.booleans()
    if field.kind == "choice":
        return st.sampled_from([str(shown(field, one)) for one in field.choices])
    if field.key == "optimizer.betas":
        return st.sampled_from(["0.9, 0.99", "0.5，0.95", "[0.8, 0.999]"])
    if field.key == "model.options.text_encoder_out_layers":
        return st.sampled_from(["9, 18, 27", "3"])
    if field.key.endswith(".size"):
        return st.sampled_from(["512, 768", "64，64"])
    if field.kind == "numbers":
        return st.sampled_from(["512", "512, 768", "１０２４", " 256 "])
    if field.kind == "table":
        return st.sampled_from(["a = 1", 'mode = "x"\nratio = 0.5'])
    if field.key == "method.factor":
        return st.sampled_from(["-1", "4", "16"])
    if field.kind == "number":
        about = field_of(field.key) or KleinOptions.model_fields[field.key.rpartition(".")[2]]
        if "float" not in repr(about.annotation):
            numbers: st.SearchStrategy[Any] = st.integers(int(low or 0) + 1, int(min(high or 1e6, 1e6)))
        else:
            start, end = float(low or 0), float(min(high or 1e6, 1e6))
            room = (end - start) / 100  # bounds may exclude their ends
            numbers = st.floats(start + room, end - room).map(lambda one: f"{one:.6e}")
        return st.one_of(numbers.map(str), *[st.just(str(one)) for one in field.choices])
    if field.key == "memory.device":
        return st.sampled_from(["cpu", "auto", "0", "cuda:1"])
    if field.key.endswith("caption_ext"):
        return st.sampled_from([".txt", ".caption"])
    if field.key == "run.name":
        return st.from_regex(r"[a-z\u4e00-\u9fa5][a-z0-9_-]{0,10}", fullmatch=True)
    if field.kind == "path":
        return st.sampled_from(
            ["C:\\new\\tab", '"D:\\my pictures\\cat"', "/data/a b", "'/x/y'", "models/猫", "builtin:nano"]
        )
    if field.kind == "paths":
        return st.sampled_from(["/a", '"C:\\new"\n/b c', "/a\n\n/b\n"])
    if field.kind == "texts":
        return st.sampled_from(["*.to_q", "a.*\n b.* "])
    return st.one_of(WORDS, st.just('""'), st.just("two\nlines"), st.just('he said "x" \\ y'))


@st.composite
def forms(draw: st.DrawFn) -> dict[str, Any]:
    keys = [key for key, field in FIELDS.items() if field.kind != "rows" and key not in LEFT_OUT]
    plain = [key for key in keys if not key.startswith(("data.sets.", "preview.prompts."))]
    chosen = draw(st.lists(st.sampled_from(plain), max_size=12, unique=True))
    found = {key: draw(control(FIELDS[key])) for key in chosen}
    for number in range(draw(st.integers(0, 2))):
        for name in draw(st.lists(st.sampled_from(["text", "size", "seed", "cfg", "negative"]), unique=True)):
            key = f"preview.prompts[{number}].{name}"
            found[key] = draw(control(FIELDS[f"preview.prompts.{name}"]))
    return found


@settings(max_examples=80, deadline=None)
@given(forms())
def test_form_file_and_command_line_give_the_same_config(
    tmp_path_factory: Any, values: dict[str, Any]
) -> None:
    """E12: what is typed -> the document -> a file; the same as --set; both Configs are equal, and so are the origins' keys."""
    text = START
    rows = sorted({key.split("]")[0] for key in values if key.startswith("preview.prompts[")})
    for _ in rows:
        text = with_row(text, "preview.prompts", {"text": "p"})
    renamed = {
        f"preview.prompts[{number}" + key[len(row) :]: given
        for number, row in enumerate(rows)
        for key, given in values.items()
        if key.startswith(row)
    }
    plain = {key: given for key, given in values.items() if not key.startswith("preview.prompts[")}
    text = changed(text, FIELDS, {**plain, **renamed})
    file = tmp_path_factory.getbasetemp() / "form.toml"
    file.write_text(text, encoding="utf-8", newline="\n")
    from_file = load_config(file)
    from_line = load_config(None, set_arguments(text))
    assert from_file.config == from_line.config
    for key, control_holds in {**plain, **renamed}.items():  # nothing was lost on the way
        said = values_of(text)
        want = typed(FIELDS[key.replace("[0]", "").replace("[1]", "")], control_holds)
        inside = {name: one for name, one in said.items() if name == key or name.startswith(f"{key}.")}
        assert (want is None and not inside) or inside.get(key) == want or isinstance(want, dict), key


@settings(max_examples=40, deadline=None)
@given(forms())
def test_what_a_control_shows_is_taken_back_as_the_same_value(values: dict[str, Any]) -> None:
    for key, control_holds in values.items():
        field = FIELDS[key.replace("[0]", "").replace("[1]", "")]
        value = typed(field, control_holds)
        if value is not None and value != []:
            assert typed(field, shown(field, value)) == value


@pytest.mark.parametrize("name", presets())
def test_a_change_keeps_comments_and_everything_else(name: str) -> None:
    text = preset_text(name)
    edited = changed(text, FIELDS, {"optimizer.lr": "3e-4", "data.images": "C:\\猫", "noise.shift": "auto"})
    assert [
        line for line in text.split("\n") if "#" in line and "lr" not in line and "images" not in line
    ] == [line for line in edited.split("\n") if "#" in line and "lr" not in line and "images" not in line]
    before, after = values_of(text), values_of(edited)
    assert after == {**before, "optimizer.lr": 3e-4, "data.images": "C:\\猫", "noise.shift": "auto"}
    assert changed(edited, FIELDS, {"noise.shift": None}).count("shift") == text.count("shift")


def test_rows_come_and_go() -> None:
    text = with_row(with_row(START, "data.sets", {}), "data.sets", {})
    text = changed(
        text, FIELDS, {"data.sets[0].images": "a", "data.sets[1].images": "b", "data.sets[1].repeats": "3"}
    )
    assert parse(text, "")["data"]["sets"] == [{"images": "a"}, {"images": "b", "repeats": 3}]
    text = without_row(text, "data.sets", 0)
    assert parse(text, "")["data"]["sets"] == [{"images": "b", "repeats": 3}]
    assert "data" not in parse(without_row(text, "data.sets", 0), "")


def test_a_text_whose_layout_cannot_be_followed_is_still_changed_rightly() -> None:
    text = 'run.steps = 5\nmodel = {family = "flux2-klein"}\n[data]\nsets = [{images = "a"}]\n'
    edited = changed(text, FIELDS, {"run.steps": "7", "model.path": "m", "data.sets[0].repeats": "2"})
    assert parse(edited, "") == {
        "run": {"steps": 7},
        "model": {"family": "flux2-klein", "path": "m"},
        "data": {"sets": [{"images": "a", "repeats": 2}]},
    }


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("optimizer.lr", "1e-4", 1e-4),
        ("optimizer.lr", "０．０００１", 1e-4),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", "fast", "fast"),
        ("optimizer.lr", "1_0", "1_0"),
        ("optimizer.lr", "  ", None),
        ("memory.vram_gb", "auto", "auto"),
        ("memory.gradient_checkpointing", "true", True),
        ("memory.base", "nonsense", "nonsense"),
        ("data.default_caption", '""', ""),
        ("data.default_caption", "", None),
        ("data.prompt", '["a"]', '["a"]'),
        ("preview.prompts.text", "", ""),
        ("data.resolution", "512，768", [512, 768]),
        ("data.resolution", "512", 512),
        ("optimizer.betas", "0.9", [0.9]),
        ("method.targets", "a\n\n b ", ["a", "b"]),
    ],
)
def test_what_is_typed_becomes_the_value_of_the_file(key: str, text: str, value: object) -> None:
    found = typed(FIELDS[key], text)
    assert found == value and type(found) is type(value)


def test_a_table_that_is_no_toml_is_told_with_its_option() -> None:
    with pytest.raises(UserError, match=r"optimizer\.args"):
        typed(FIELDS["optimizer.args"], "a = = 1")


@pytest.mark.parametrize(
    "pasted, path",
    [
        ('"C:\\my pictures\\cat"', "C:\\my pictures\\cat"),
        ("'/home/a b'", "/home/a b"),
        ("  /x  \n", "/x"),
        ("“D:\\图”", "D:\\图"),
        ("\u202aC:\\from explorer", "C:\\from explorer"),
        ("file:///C:/a%20b", "C:/a b"),
        ("file:///home/%E7%8C%AB", "/home/猫"),
        ("it's", "it's"),
    ],
)
def test_pasted_paths_are_cleaned(pasted: str, path: str) -> None:
    assert cleaned(pasted) == path


def test_a_terminals_escapes_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whitetuner.gui.pickers.os.name", "posix")
    assert cleaned("/home/my\\ pictures\\ \\(2\\)") == "/home/my pictures (2)"
