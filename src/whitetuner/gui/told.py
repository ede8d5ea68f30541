"""What went wrong, in the page's language: a UserError by its templates, and English sentences of a child process by matching.

The table (static/errors_zh.toml; terminal_zh.toml for what is no error; a family's own words_zh.toml) has a line for every
literal template in the source:
English = Chinese, same placeholders.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources

from whitetuner.errors import UserError, UserErrors
from whitetuner.families import registry
from whitetuner.gui import words
from whitetuner.gui.words_zh import FIELDS
from whitetuner.tongue import Phrases

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


def told(error: UserError, language: str) -> str:
    """The whole message, one mistake after the other."""
    lines = []
    for one in each(error):
        what, mend = parts(one, language)
        place = f"{where(one.where, language)}{'：' if language == 'zh' else ': '}" if one.where else ""
        lines.append(f"{place}{what}" + (f"\n  -> {mend}" if mend else ""))
    return "\n".join(lines)


def each(error: UserError) -> Iterator[UserError]:
    """The single mistakes of one that holds several."""
    if isinstance(error, UserErrors):
        for one in error.errors:
            yield from each(one)
    else:
        yield error


def parts(error: UserError, language: str) -> tuple[str, str]:
    """(what, mend), values filled in."""
    if language == "en":
        return error.what, error.mend
    return (
        phrases().filled(error.what_template, error.values),
        phrases().filled(error.mend_template, error.values),
    )


def where(place: str, language: str) -> str:
    """The place, with the option's label behind its key and the words of its origin."""
    if language == "en":
        return place
    key = place.partition(" (")[0]
    found = words.chinese(key)
    if found is None:
        return place
    line = re.search(r" line (\d+)", place)
    return f"{found[0]}（{key}{f'，第 {line[1]} 行' if line else ''}）"


def translated(text: str, language: str) -> str:
    """English that a child process printed or an event holds, sentence by sentence; what no template matches stays."""
    return text if language == "en" else phrases().text(text)


@cache
def table() -> Mapping[str, str]:
    """Template -> its Chinese."""
    static = resources.files("whitetuner.gui").joinpath("static")
    texts = [
        static.joinpath(name).read_text(encoding="utf-8") for name in ("errors_zh.toml", "terminal_zh.toml")
    ]
    families = (words.family_words(name).get("errors", {}) for name in registry.FAMILIES)
    parts = (*(part for text in texts for part in tomllib.loads(text).values()), *families)
    return {english: chinese for part in parts for english, chinese in part.items()}


@cache
def phrases() -> Phrases:
    return Phrases(table(), _value)


@cache
def _known() -> Mapping[str, str]:
    """English texts that appear as values of other messages -> Chinese: descriptions, and the table itself."""
    return {words.english(key): text for key, (_, text) in FIELDS.items() if ":" not in key} | dict(table())


def _value(value: object) -> object:
    if not isinstance(value, str) or not value:
        return value
    found = _known().get(value)
    if found is not None:
        return found
    if " or " in value:  # several kinds of values that would do
        return " 或 ".join(str(_value(one)) for one in value.split(" or "))
    bound = re.fullmatch(
        r"(greater than|less than|greater than or equal to|less than or equal to) (\S+)", value
    )
    if bound:
        return f"{_BOUNDS[bound[1]]} {bound[2]}"
    return translated(value, "zh") if len(value) > _SENTENCE else value


#: A value longer than this may be a message of its own (what a child process said).
_SENTENCE = 16
_BOUNDS = {
    "greater than": "大于",
    "less than": "小于",
    "greater than or equal to": "不小于",
    "less than or equal to": "不大于",
}
