"""The forms are the schema: every option has its control, its words in both languages, and a place that suits it."""

from __future__ import annotations

import re

import pytest

from whitetuner.config.schema import Config
from whitetuner.config.told import field_of, keys_of, section_of
from whitetuner.families import registry
from whitetuner.gui import forms, words, words_zh
from whitetuner.gui.fields import FIXED, FormField, all_fields, field_keys
from whitetuner.gui.training_tabs import tab_for, tabs

FORMS = sorted(all_fields().items())


def flat(fields: tuple[FormField, ...]) -> list[FormField]:
    return [one for field in fields for one in (field, *field.rows)]


@pytest.mark.parametrize("at, fields", FORMS, ids=[f"{family}-{task}" for (family, task), _ in FORMS])
def test_every_option_of_the_schema_is_on_every_form(
    at: tuple[str, str], fields: tuple[FormField, ...]
) -> None:
    wanted = {key for key in keys_of(Config) if section_of(field_of(key).annotation) is None}  # type: ignore[union-attr]
    wanted -= {"model.options"}
    wanted |= {f"model.options.{name}" for name in registry.spec(at[0]).options.model_fields}
    assert wanted <= set(field_keys(fields))
    drawn = {row["key"] for row in forms.spec_json(tab_for(*at), "en")["fields"]}  # type: ignore[arg-type]
    assert {field.key for field in fields} - set(FIXED) == drawn


@pytest.mark.parametrize("at, fields", FORMS, ids=[f"{family}-{task}" for (family, task), _ in FORMS])
def test_a_form_begins_with_at_most_eight_options_and_has_twenty_more(
    at: tuple[str, str], fields: tuple[FormField, ...]
) -> None:
    tiers = [field.tier for field in fields if not field.key.startswith("model.options.")]
    assert 5 <= tiers.count("basic") <= 8
    assert tiers.count("advanced") <= 20
    assert all(field.tier != "expert" for field in fields if field.key.startswith("model.options."))


@pytest.mark.parametrize("at, fields", FORMS, ids=[f"{family}-{task}" for (family, task), _ in FORMS])
def test_every_option_speaks_both_languages(at: tuple[str, str], fields: tuple[FormField, ...]) -> None:
    missing = []
    for field in flat(fields):
        if words.chinese(field.key, at[0]) is None:
            missing.append(field.key)
        for language in words.LANGUAGES:
            if not words.label(field.key, language, at[0]) or (
                field.kind != "rows" and not words.help_text(field.key, language, at[0])
            ):
                missing.append(f"{language}: {field.key}")
    assert not missing, "add them to gui/words_zh.py (a family's own as 'FAMILY:option')"


def test_the_chinese_is_chinese_and_names_only_options_that_exist() -> None:
    known = {key for _, fields in FORMS for key in field_keys(fields)}
    families = "|".join(registry.FAMILIES)
    for key, (label, text) in words_zh.FIELDS.items():
        plain = f"model.options.{key.partition(':')[2]}" if ":" in key else key
        assert plain in known or key.partition(":")[0] in families or key in ("model.options", *_COMING), key
        assert label and any("\u4e00" <= char <= "\u9fff" for char in text), key
        assert not text.endswith("。"), key
    for key, _ in words_zh.CHOICES:
        assert key in known or key in (*FIXED, *_COMING), key


#: Options of families that land one by one; their words wait for them.
_COMING = ("model.options.expert", "model.options.boundary")


def test_every_section_has_a_title_in_both_languages() -> None:
    sections = {field.section for _, fields in FORMS for field in fields}
    for language in words.LANGUAGES:
        assert all(words.section(name, language) != name for name in sections)


def test_texts_of_the_page_exist_in_both_languages() -> None:
    for page in ("form", "data"):
        one, other = words.texts(page, "zh"), words.texts(page, "en")
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] and other[name]
            assert set(_names(one[name])) == set(_names(other[name])), name


def _names(text: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", text)


def test_the_tabs_are_the_seeds_in_its_order() -> None:
    seed = [
        "FLUX.2 Klein Edit",
        "FLUX.2 Klein T2I",
        "WAN I2V",
        "Qwen T2I",
        "Qwen Edit",
        "ZImage",
        "ZImage V2",
        "GLM-Image",
    ]
    titles = [tab.title("zh") for tab in tabs()]
    assert [title for title in titles if title in seed] == [title for title in seed if title in titles]
    shown = {(tab.family, task) for tab in tabs() for task in tab.tasks}
    assert shown == {at for at, _ in FORMS}
    assert len({tab.key for tab in tabs()}) == len(tabs())
