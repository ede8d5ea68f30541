"""The form's document is the TOML text itself: a form's changes are written into it, its values are read from it.

So the form, the expert's editor, a draft, an imported file and what is trained are one thing, comments included.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import tomlkit
from tomlkit import TOMLDocument
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Item, Table

from whitetuner.config.document import parse
from whitetuner.config.load import flat
from whitetuner.config.write import toml_value
from whitetuner.errors import UserError
from whitetuner.gui.asked import plain
from whitetuner.gui.fields import FormField
from whitetuner.gui.pickers import cleaned

#: What stands for the typed text in messages about the document.
NAME = "TOML"


def values_of(text: str) -> dict[str, Any]:
    """{dotted key: value} of everything that the document says; rows are `data.sets[0].images`. Raises UserError."""
    return flat(parse(text, NAME))


def shown(field: FormField, value: Any) -> Any:
    """A value as its control holds it: a bool for a tick, text for all else ("" is an empty text on purpose)."""
    if value is None:
        return None
    if field.kind == "bool":
        return value if isinstance(value, bool) else None
    if field.kind in ("paths", "texts"):
        return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if field.kind == "numbers":
        return ", ".join(map(number_text, value)) if isinstance(value, (list, tuple)) else number_text(value)
    if field.kind == "table":
        return "\n".join(f"{key} = {toml_value(one)}" for key, one in value.items())
    return '""' if value == "" and not field.needed else number_text(value)


def number_text(value: Any) -> str:
    """A number as people write it: 0.0001, 3e-05, 4; words as they are; true and false as in the file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    short = repr(value)
    if abs(value) < 1e-3 and "e" not in short:
        mantissa, exponent = f"{value:.17e}".split("e")
        plain = f"{float(mantissa):.10g}e{int(exponent)}"
        short = plain if float(plain) == value else short
    return re.sub(r"\.0$", "", short)


def typed(field: FormField, given: Any) -> Any:
    """What a control holds -> the value of the file; None: nothing is said. Raises UserError for a table that is no TOML.

    Texts stay what was typed, except that "" (two quotes) is the empty text. What is no number stays a text, which the
    schema then refuses in its own words.
    """
    if given is None or isinstance(given, bool):
        return given
    text = plain(str(given)).replace("\r\n", "\n").replace("\r", "\n")
    if field.kind in ("text", "long"):
        if text.strip() == '""' or (field.needed and not text.strip()):
            return ""
        return text if text.strip() else None
    if not text.strip():
        return None
    if field.kind == "path":
        return cleaned(text)
    lines = [line for line in text.split("\n") if line.strip()]
    if field.kind == "paths":
        return [cleaned(line) for line in lines]
    if field.kind == "texts":
        return [line.strip() for line in lines]
    if field.kind == "table":
        return parse(text, field.key)
    word = unicodedata.normalize(
        "NFKC", text
    ).strip()  # digits of a Chinese keyboard are as wide as its characters
    if field.kind == "numbers":
        parts = [_number(part) for part in re.split(r"[\s,;、]+", word.strip("[]() ")) if part]
        several = len(parts) != 1 or not _takes_one(field)
        return parts if several else parts[0]
    for choice in field.choices:
        if number_text(choice) == word:
            return choice
    return word if field.kind == "choice" else _number(word)


def changed(text: str, fields: Mapping[str, FormField], changes: Mapping[str, Any]) -> str:
    """The document with some values set (None: taken out). keys: dotted, with row numbers. Raises UserError."""
    for key, given in changes.items():
        value = typed(_field_of(fields, key), given)
        text = _edited(text, key, value)
    return text


def _field_of(fields: Mapping[str, FormField], key: str) -> FormField:
    """Raises KeyError for what is no option, and for an option of a list without the row's number (or too large a one)."""
    found = fields[without_rows(key)]
    around = fields.get(found.section)
    pattern = re.escape(found.key)
    if around is not None and around.kind == "rows":
        pattern = rf"{re.escape(around.key)}\[\d{{1,4}}\]\.\w+"
    if found.kind == "rows" or re.fullmatch(pattern, key) is None:
        raise KeyError(key)
    return found


def with_row(text: str, key: str, row: Mapping[str, Any]) -> str:
    """One more entry of [[key]]. Raises UserError."""
    values = parse(text, NAME)
    rows = _inner(values, key.split("."))
    count = len(rows) if isinstance(rows, list) else 0
    wanted = _placed(values, _steps(f"{key}[{count}]"), dict(row))
    return _faithful(text, wanted, lambda document: _add(document, key.split("."), row))


def without_row(text: str, key: str, number: int) -> str:
    """The document without one entry of [[key]]. Raises UserError."""
    values = parse(text, NAME)
    rows = _inner(values, key.split("."))
    if not isinstance(rows, list) or not 0 <= number < len(rows):
        return text
    kept = [*rows[:number], *rows[number + 1 :]]
    wanted = _placed(values, list(key.split(".")), kept or None)

    def take(document: TOMLDocument) -> None:
        *outer, last = key.split(".")
        table = _table(document, outer)
        if kept:
            del table[last][number]
        else:
            del table[last]

    return _faithful(text, wanted, take)


def set_arguments(text: str) -> list[str]:
    """The whole document as `--set` values: what to type instead. Raises UserError."""
    found = []
    for section, values in parse(text, NAME).items():
        rows = values if isinstance(values, Mapping) else {}
        for name, value in flat_tables(rows, f"{section}.").items():
            found.append(f"{name}={inline(value)}")
    return found


def flat_tables(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Dotted keys down to plain values; lists of tables stay whole, since --set cannot add to a list."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flat_tables(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def inline(value: Any) -> str:
    """A value on one line of TOML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {inline(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(inline, value)) + "]"
    return toml_value(value)


def without_rows(key: str) -> str:
    """`data.sets[1].images` -> `data.sets.images`."""
    return re.sub(r"\[\d+\]", "", key)


def _takes_one(field: FormField) -> bool:
    """Whether a single number may stand without a list (`resolution = 1024`)."""
    return field.key.endswith(("resolution", "num_frames"))


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text.replace("_", "x"))
        except ValueError:
            continue
    return text


def _edited(text: str, key: str, value: Any) -> str:
    values = parse(text, NAME)
    steps = _steps(key)
    if value is None and _inner(values, steps) is None:
        return text
    wanted = _placed(values, steps, value)
    return _faithful(text, wanted, lambda document: _put(document, steps, value))


def _faithful(text: str, wanted: Mapping[str, Any], edit: Any) -> str:
    """The edited text when it reads as wanted; else the values alone, written anew: comments are worth less than truth."""
    try:
        document = tomlkit.parse(text)
        edit(document)
        result = tomlkit.dumps(document)
        if parse(result, NAME) == wanted:
            return result
    except (TOMLKitError, KeyError, TypeError, IndexError, UserError):
        pass  # a layout that the editor cannot follow (dotted tables split over the file)
    return tomlkit.dumps(wanted)


def _steps(key: str) -> list[str | int]:
    steps: list[str | int] = []
    for part in key.split("."):
        name, _, index = part.partition("[")
        steps.append(name)
        if index:
            steps.append(int(index[:-1]))
    return steps


def inner_value(values: Any, key: str) -> Any:
    """What stands at a dotted key with row numbers; None where nothing does."""
    return _inner(values, _steps(key))


def _inner(values: Any, steps: Sequence[str | int]) -> Any:
    for step in steps:
        if isinstance(step, int):
            if not isinstance(values, list) or step >= len(values):
                return None
        elif not isinstance(values, Mapping) or step not in values:
            return None
        values = values[step]
    return values


def _placed(values: Any, steps: Sequence[str | int], value: Any) -> Any:
    """A copy of the values with one changed; empty tables that are left over go."""
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        rows = list(_kind_of(list, values, "[[...]]"))
        rows[step : step + 1] = [_placed(rows[step] if step < len(rows) else {}, rest, value)]
        return rows
    table = dict(_kind_of(Mapping, values, "[...]"))
    inner = _placed(table.get(step), rest, value)
    if inner is None or (inner == {} and value is None):
        table.pop(step, None)
    else:
        table[step] = inner
    return table


def _kind_of(kind: type, value: Any, written: str) -> Any:
    """A table or a list of tables, empty where nothing stands. Raises UserError when the text says something else there."""
    if value is not None and not isinstance(value, kind):
        raise UserError(
            "the text holds {value} where a table belongs",
            mend="mend the text first: write {written}",
            value=inline(value)[:80],
            written=written,
        )
    return value if value is not None else ([] if kind is list else {})


def _put(document: TOMLDocument, steps: Sequence[str | int], value: Any) -> None:
    *outer, last = steps
    table = _table(document, outer)
    if value is None:
        del table[str(last)]
        names = [str(step) for step in outer]
        if not isinstance(table, (Table,)) or len(table) or any(isinstance(step, int) for step in outer):
            return
        _table(document, outer[:-1]).pop(names[-1])
        return
    old = table.get(str(last))
    new = _item(value)
    if isinstance(old, Item) and not isinstance(old, (AoT, Table)):
        new.trivia.comment, new.trivia.comment_ws = old.trivia.comment, old.trivia.comment_ws
    table[str(last)] = new


def _add(document: TOMLDocument, steps: Sequence[str], row: Mapping[str, Any]) -> None:
    *outer, last = steps
    table = _table(document, outer)
    entry = tomlkit.table()
    for name, value in row.items():
        entry[name] = _item(value)
    if last in table:
        table[last].append(entry)
    else:
        rows = tomlkit.aot()
        rows.append(entry)
        table[last] = rows


def _table(document: TOMLDocument, steps: Sequence[str | int]) -> Any:
    """The table at a place, made where it is missing."""
    table: Any = document
    for step in steps:
        if isinstance(step, str) and step not in table:
            if isinstance(table, TOMLDocument) and len(table):
                table.add(tomlkit.nl())
            table[step] = tomlkit.table()
        table = table[step]
    return table


def _item(value: Any) -> Item:
    if isinstance(value, str) and "\\" in value and "'" not in value and value.isprintable():
        return tomlkit.string(value, literal=True)
    if isinstance(value, str) and "\n" in value:
        return tomlkit.item(value)
    return tomlkit.item(list(value) if isinstance(value, tuple) else value)
