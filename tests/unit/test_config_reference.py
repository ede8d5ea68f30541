"""The schema tells of itself: descriptions, docs/config.md, presets; and no option is read by nobody."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from whitetuner.config import landed
from whitetuner.config.goals import goals, with_goal, with_memory
from whitetuner.config.kinds import refuse_wrong_data
from whitetuner.config.landed import not_landed, refuse_not_landed
from whitetuner.config.load import load_config
from whitetuner.config.preset import preset_text, presets
from whitetuner.config.reference import text
from whitetuner.config.schema import Config
from whitetuner.config.sources import with_sources
from whitetuner.config.told import FOREIGN, field_of, keys_of, section_of
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.nano.builtin import CFG, MAX_SEQUENCE_LENGTH, STEPS
from whitetuner.tiny import tiny_text

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "whitetuner"


def options() -> list[str]:
    """Every dotted option, tables left out."""
    found = []
    for key in keys_of(Config):
        field = field_of(key)
        assert field is not None
        if section_of(field.annotation) is None:
            found.append(key)
    return found


def test_docs_config_md_is_what_the_schema_says_now() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == text(), "run: python -m whitetuner.config.reference"


@pytest.mark.parametrize("key", options())
def test_every_option_is_described(key: str) -> None:
    field = field_of(key)
    assert field is not None and field.description and len(field.description) > 5
    assert not field.description.endswith(".")


def test_every_option_is_read_by_the_program_or_refused() -> None:
    """An option that nobody reads would change nothing: it is named as an attribute outside of config/, or refused."""
    read = set()
    for file in SOURCES.rglob("*.py"):
        if file.parent.name != "config":
            tree = ast.parse(file.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            # getattr over a list of names, as the parts of a model are read
            read |= {
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
    known = {*not_landed(), "model.options"}  # Config.model_options reads that one
    unread = [
        key
        for key in options()
        if key.rpartition(".")[2] not in read and key.replace(".sets.", ".") not in known
    ]
    assert not unread


def test_defaults_are_never_refused_and_sets_are_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(landed._REFUSED, "data.videos", ((), "a data set to come"))
    monkeypatch.setitem(landed._REFUSED, "method.kind", (("lora",), "a method to come"))
    refuse_not_landed(load_config(None, base={"model.family": "flux2-klein", "method.kind": "lora"}).config)
    with pytest.raises(UserError, match="not there yet"):
        refuse_not_landed(
            load_config(None, base={"model.family": "flux2-klein", "method.kind": "full"}).config
        )
    config = load_config(
        None, base={"model.family": "flux2-klein", "data.sets": [{"images": "a"}, {"videos": "b"}]}
    ).config
    with pytest.raises(UserError, match=r"data\.sets\[1\]\.videos"):
        refuse_not_landed(config)


def test_words_of_other_programs_lead_to_options_that_exist() -> None:
    assert all(field_of(key) is not None for key in FOREIGN.values())


def test_proposals_of_every_family_are_options_and_fit() -> None:
    for name in registry.FAMILIES:
        loaded = load_config(None, base={"model.family": name})
        for key in registry.spec(name).settings:
            assert field_of(key) is not None, f"{name}: {key}"
            assert loaded.origins[key].startswith("family default (")


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_is_a_config_that_trains_today(name: str) -> None:
    config = load_config(None, preset=name).config
    refuse_not_landed(config)
    refuse_wrong_data(config)
    assert config.data_sets()
    assert preset_text(name).startswith("# "), "its first line says what it is for"
    assert name.startswith(("nano", config.model.family))


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_for_every_goal_and_card_keeps_its_comments_and_says_why(name: str, tmp_path: Path) -> None:
    plain = preset_text(name)
    task = load_config(None, preset=name).config.model.task
    for goal in goals((task,)):
        text = with_memory(with_goal(plain, goal.key), 12)
        (tmp_path / "c.toml").write_text(text, encoding="utf-8")
        config = load_config(tmp_path / "c.toml").config
        assert config.memory.vram_gb == 12
        for key, value in goal.values():
            section, _, field = key.partition(".")
            assert getattr(getattr(config, section), field) == value
        for _, why in goal.changes.values():
            assert f"# {why}" in text
        kept = [line for line in plain.splitlines() if line.startswith("#")]
        assert [line for line in text.splitlines() if line.startswith("#")] == kept
    others = {one.key for one in goals()} - {one.key for one in goals((task,))}
    for key in [*others, "nonsense"]:
        with pytest.raises(UserError, match="there is no goal"):
            with_goal(plain, key)
    for gb in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(UserError, match="no card's memory"):
            with_memory(plain, gb)


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_is_given_with_the_sources_of_its_values(name: str, tmp_path: Path) -> None:
    text = with_sources(preset_text(name))
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    config = load_config(tmp_path / "c.toml").config
    assert config == load_config(None, preset=name).config, "comments change nothing"
    for key, setting in registry.spec(config.model.family).settings.items():
        section, _, field = key.partition(".")
        if getattr(getattr(config, section), field) == setting.value:
            unused = {"lora": ("factor", "full_matrix"), "lokr": ("rank",)}.get(config.method.kind, ())
            assert setting.source in text or field in unused, key


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="flux2-klein-lokr"):
        preset_text("flux9")


def test_the_preset_of_the_embedded_model_says_what_the_model_wants() -> None:
    config = load_config(None, preset="nano-lokr").config
    assert config.model.options["max_sequence_length"] == MAX_SEQUENCE_LENGTH
    assert [(one.steps, one.cfg) for one in config.preview.prompts] == [(STEPS, CFG)]


def test_a_tiny_config_for_a_folder_of_pictures_takes_the_embedded_model(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    pictures = tmp_path / "it's 照片"
    pictures.mkdir()
    file.write_text(tiny_text(pictures), encoding="utf-8")
    config = load_config(file).config
    assert (config.model.path, config.data.images) == ("builtin:nano", str(pictures))


def test_a_tiny_config_for_an_edit_folder_is_an_edit_config(tmp_path: Path) -> None:
    file, folder = tmp_path / "c.toml", tmp_path / "it's 照片"
    for name in ("target", "condition_1", "condition_2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(b"")
    file.write_text(tiny_text(folder), encoding="utf-8")
    config = load_config(file).config
    assert (config.model.task, config.model.path) == ("edit", "builtin:nano")
    assert config.data.target == str(folder / "target") and config.data.images is None
    assert config.data.conditions == [str(folder / "condition_1"), str(folder / "condition_2")]
    assert config.preview.prompts[0].images == [str(folder / "condition_1" / "a.png")]
    refuse_wrong_data(config)


def test_a_tiny_config_for_a_model_that_edits_alone_is_an_edit_config(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    (model / "transformer").mkdir(parents=True)
    spec = registry.spec("qwen-image")
    (model / "model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}', encoding="utf-8")
    (model / "transformer" / "config.json").write_text(
        f'{{"_class_name": "{spec.transformer_class}"}}', encoding="utf-8"
    )
    file = tmp_path / "c.toml"
    file.write_text(tiny_text(model), encoding="utf-8")
    config = load_config(file).config
    assert (config.model.task, len(config.data.conditions)) == ("edit", 1)
    assert len(config.preview.prompts[0].images) == 1
    refuse_wrong_data(config)


def test_a_tiny_config_for_a_model_folder_tells_its_family(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    (model / "transformer").mkdir(parents=True)
    (model / "model_index.json").write_text("{}", encoding="utf-8")
    spec = registry.spec("flux2-klein")
    (model / "transformer" / "config.json").write_text(
        f'{{"_class_name": "{spec.transformer_class}"}}', encoding="utf-8"
    )
    file = tmp_path / "c.toml"
    file.write_text(tiny_text(model), encoding="utf-8")
    config = load_config(file).config
    assert (config.model.family, config.model.path, config.data.resolution) == ("flux2-klein", str(model), 64)
    assert config.model.options == dict(spec.tiny_options)
    (model / "transformer" / "config.json").write_text('{"_class_name": "Other"}', encoding="utf-8")
    with pytest.raises(UserError, match="no known family uses a Other"):
        tiny_text(model)
    with pytest.raises(UserError, match="there is no folder"):
        tiny_text(tmp_path / "nowhere")
