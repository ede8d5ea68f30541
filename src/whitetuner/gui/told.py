"""What went wrong, in the page's language: a UserError by its templates, and English sentences of a child process by matching.

The table (static/errors_zh.toml) has one line for every literal template in the source: English = Chinese, same placeholders.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from whitetuner.errors import UserError, UserErrors
from whitetuner.gui import words
from whitetuner.gui.words_zh import FIELDS

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
    values = {name: _value(value) for name, value in error.values.items()}
    return _filled(error.what_template, values), _filled(error.mend_template, values)


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
    if language == "en":
        return text
    return "\n".join(_sentence(line) for line in text.split("\n"))


@cache
def table() -> Mapping[str, str]:
    """Template -> its Chinese."""
    text = resources.files("whitetuner.gui").joinpath("static/errors_zh.toml").read_text(encoding="utf-8")
    return {english: chinese for part in tomllib.loads(text).values() for english, chinese in part.items()}


def _filled(template: str, values: Mapping[str, Any]) -> str:
    return table().get(template, template).format(**values)


@cache
def _known() -> Mapping[str, str]:
    """English texts that appear as values of other messages -> Chinese: descriptions, and the table itself."""
    return {words.english(key): text for key, (_, text) in FIELDS.items() if ":" not in key} | dict(table())


def _value(value: object) -> object:
    if not isinstance(value, str):
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
_SENTENCE = 24
_BOUNDS = {
    "greater than": "大于",
    "less than": "小于",
    "greater than or equal to": "不小于",
    "less than or equal to": "不大于",
}


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    """Templates as patterns, those with the most text of their own first."""
    found = []
    for english, chinese in table().items():
        plain = re.split(r"\{\w+(?:![rsa])?(?::[^}]*)?\}", english)
        names = re.findall(r"\{(\w+)", english)
        if len("".join(plain).strip()) < 6:
            continue  # too little to know it by
        seen: set[str] = set()
        pattern = re.escape(plain[0])
        for name, after in zip(names, plain[1:], strict=True):
            pattern += f"(?P={name})" if name in seen else f"(?P<{name}>.+?)"
            pattern += re.escape(after)
            seen.add(name)
        found.append((re.compile(pattern, re.DOTALL), re.sub(r"\{(\w+)[^}]*\}", r"{\1}", chinese)))
    return tuple(sorted(found, key=lambda one: -len(one[0].pattern)))


def _sentence(line: str) -> str:
    """A line as UserError renders it: "WHERE: what", or "  -> mend"."""
    lead = re.match(r"\s*(-> |error: |warning: |note: )?", line)
    assert lead is not None
    start, rest = line[: lead.end()], line[lead.end() :]
    cuts = [0, *(found.end() for found in re.finditer(r": ", rest))]
    for cut in cuts:
        for pattern, chinese in _patterns():
            found = pattern.fullmatch(rest[cut:])
            if found is not None:
                values = {name: _value(value) for name, value in found.groupdict().items()}
                return f"{start}{rest[:cut]}{chinese.format(**values)}"
    return line
