"""Configs of earlier versions in today's words: options that were renamed, left or changed their values, each told.

A config carries `format = N`, the number of changes that its writer knew, plus one. A change is known by itself: an old name
never comes back with another meaning, an old value is refused by the schema (tests hold both). So configs without the
number, those in checkpoints and single settings are read as well; the number is there to refuse those of a newer version.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.container import Container
from tomlkit.items import Item, Table

from whitetuner.config.document import key_lines, parse, read_text
from whitetuner.errors import EXIT_ENVIRONMENT, UserError


@dataclass(frozen=True)
class Change:
    """key: dotted, as it was (`data.sets.x`: in every row); to: its name today, None: it is gone; values: old -> new, where
    they changed (others stay); only: dotted key -> value, what else the config must say; why: in the message."""

    key: str
    to: str | None
    why: str
    values: Mapping[Any, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)


#: In the order of time: a new one comes last, none is ever taken out.
CHANGES: tuple[Change, ...] = (
    Change(
        "model.options.variant",
        "model.options.variant",
        "the folder tells base 4B from base 9B",
        values={"base": "auto"},
        only={"model.family": "flux2-klein"},
    ),
)
#: Of the configs that are written today.
FORMAT = 1 + len(CHANGES)
KEY = "format"
#: The same beside a config inside of another document (a checkpoint's), which has a format of its own.
CONFIG_FORMAT = "config_format"


@dataclass(frozen=True)
class Moved:
    """What became of one option of a document. to: None where it is gone. Keys with row numbers."""

    key: str
    to: str | None
    old: Any
    new: Any
    why: str

    def __str__(self) -> str:
        if self.to is None:
            return f"{self.key} is gone and was left out: {self.why}"
        if self.to == self.key:
            return f"{self.key} = {_toml(self.old)} is now {_toml(self.new)}: {self.why}"
        value = "" if self.old == self.new else f" = {_toml(self.new)}"
        return f"{self.key} is now {self.to}{value}: {self.why}"


def _toml(value: Any) -> str:
    return tomlkit.item(value).as_string()


def refuse_newer(number: object, where: str, newest: int = FORMAT) -> None:
    """Raises UserError for a config of a version of White Tuner that is newer than this one, and for what is no number."""
    if type(number) is not int or number < 1:
        raise UserError(
            "{number} is no format of a config",
            where=where,
            mend="leave it out: the config is then read by what stands in it",
            number=number,
        )
    if number > newest:
        raise UserError(
            "this config is of a newer White Tuner: it has format {number}, this one reads up to {newest}",
            where=where,
            mend="update White Tuner (git pull, then `python launch.py`; or pip install -U), or use the version that wrote it",
            number=number,
            newest=newest,
        )


def today(
    document: Mapping[str, Any], changes: Sequence[Change] = CHANGES, where: str = KEY
) -> tuple[dict[str, Any], list[Moved]]:
    """(the values in today's words, what was changed). The document itself stays as it is, `format` is taken out.

    Raises UserError for a newer format, and where an option is given by its old and its new name.
    """
    values = _copy(document)
    if KEY in values:
        refuse_newer(values.pop(KEY), where, 1 + len(changes))
    moved: list[Moved] = []
    for change in changes:
        if all(_at(values, key) == value for key, value in change.only.items()):
            moved += _applied(values, change)
    return values, moved


def _applied(values: dict[str, Any], change: Change) -> Iterator[Moved]:
    table_names, _, name = change.key.rpartition(".")
    for table, prefix in list(_tables(values, table_names.split(".") if table_names else [])):
        if name not in table or (change.to == change.key and not _known(change.values, table[name])):
            continue
        old = table.pop(name)
        new = change.values[old] if _known(change.values, old) else old
        to = change.to
        if to is not None:
            to_table, _, to_name = to.rpartition(".")
            if to_table == table_names:  # in the same row
                target, to = table, f"{prefix}{to_name}"
            else:
                target = values
                for part in to_table.split(".") if to_table else []:
                    target = target.setdefault(part, {})
            if to_name in target:
                raise UserError(
                    "{old} and {new} are one option, by its earlier and its present name",
                    where=f"{prefix}{name}",
                    mend="leave {old} out",
                    old=f"{prefix}{name}",
                    new=to,
                )
            target[to_name] = new
        yield Moved(f"{prefix}{name}", to, old, new, change.why)


def _known(values: Mapping[Any, Any], value: Any) -> bool:
    return isinstance(value, (str, int, float)) and value in values


def _tables(values: Any, names: list[str], at: str = "") -> Iterator[tuple[dict[str, Any], str]]:
    """Every table of that name (all rows of a list of tables) with its dotted place."""
    if not isinstance(values, dict):
        return
    if not names:
        yield values, at
        return
    inner = values.get(names[0])
    rows = (
        [(f"{at}{names[0]}[{number}].", one) for number, one in enumerate(inner)]
        if isinstance(inner, list)
        else [(f"{at}{names[0]}.", inner)]
    )
    for place, one in rows:
        yield from _tables(one, names[1:], place)


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(one) for key, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, (list, tuple)) else value


# -- the text of a file --------------------------------------------------------------------------------------------


def stamped(text: str, number: int = FORMAT) -> str:
    """A config's text with its format, below the comments at its head."""
    lines = text.split("\n")
    for place, line in enumerate(lines):
        if re.match(rf"\s*{KEY}\s*=", line):
            lines[place] = f"{KEY} = {number}"
            return "\n".join(lines)
        if re.match(r"\s*\[", line):
            break
    place = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
    lines[place:place] = [f"{KEY} = {number}"] + ([] if place < len(lines) and not lines[place] else [""])
    return "\n".join(lines)


def rewritten(text: str, changes: Sequence[Change] = CHANGES) -> tuple[str, list[Moved]]:
    """(a config's text in today's words, what was changed). Comments and the order of what did not change stay.

    Raises UserError as `today`. text: TOML that can be read (`document.parse` says so)
    """
    moved = today(tomlkit.parse(text).unwrap(), changes)[1]
    for one in moved:
        text = _renamed(text, one) or _edited(text, one)
    return (stamped(text, 1 + len(changes)) if moved else text), moved


def rewrite_file(path: Path) -> list[str]:
    """Puts a config file into today's words, keeps what it was beside it (.bak); -> what was changed, in words.

    Raises UserError when it cannot be read or written, is no TOML, or is of a newer version.
    """
    text = read_text(path)
    refuse_newer(parse(text, str(path)).get(KEY, 1), f"{path}, {KEY}")
    new, moved = rewritten(text)
    if not moved:
        return [f"{path.name} is in today's words: nothing to rewrite"]
    kept = path.with_name(path.name + ".bak")
    number = 0
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}.bak{number}")
    try:
        data = path.read_bytes()
        kept.write_bytes(data)
        beside = path.with_name(f".{path.name}.writing")
        beside.write_bytes(new.replace("\n", "\r\n" if b"\r\n" in data else "\n").encode())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            "it cannot be rewritten ({reason})",
            where=str(path),
            mend="make the file and its folder writable",
            code=EXIT_ENVIRONMENT,
            reason=error.strerror or error,
        ) from error
    return [*(f"{path.name}: {one}" for one in moved), f"{path.name} is rewritten (kept: {kept.name})"]


def _renamed(text: str, moved: Moved) -> str | None:
    """Only another name in the same table, on a line of its own: the line keeps its place and its comment."""
    line = key_lines(text).get(moved.key)
    if moved.to is None or line is None or moved.old != moved.new:
        return None
    (before, name), (after, new) = _split(moved.key), _split(moved.to)
    if before != after:
        return None
    lines = text.split("\n")
    found = re.sub(rf"^(\s*){re.escape(name)}(\s*=)", rf"\g<1>{new}\g<2>", lines[line - 1])
    if found == lines[line - 1]:
        return None
    lines[line - 1] = found
    return "\n".join(lines)


def _split(key: str) -> tuple[str, str]:
    table, _, name = key.rpartition(".")
    return table, name


def _edited(text: str, moved: Moved) -> str:
    document = tomlkit.parse(text)
    table, name = _table(document, _split(moved.key)[0]), _split(moved.key)[1]
    inside = getattr(
        table, "value", table
    )  # a table's container gives the item itself, where [] makes a bool of it
    old = inside.item(name) if isinstance(inside, Container) else table[name]
    if moved.to == moved.key:
        table[name] = _like(old, moved.new)
        return tomlkit.dumps(document)
    del table[name]
    if moved.to is not None:
        before, new = _split(moved.to)
        target: Any = document
        for part in before.split(".") if before and "[" not in before else []:
            target = target.setdefault(part, tomlkit.table())
        if "[" in before:
            target = _table(document, before)
        target.append(new, _like(old, moved.new))
    return tomlkit.dumps(document)


def _table(document: Any, key: str) -> Any:
    for name, number in re.findall(r"([^.\[\]]+)(?:\[(\d+)\])?", key):
        document = document[name][int(number)] if number else document[name]
    return document


def _like(old: Any, value: Any) -> Item:
    """A value with the comment that stood behind another one."""
    item = tomlkit.item(value)
    if isinstance(old, Item) and not isinstance(old, Table):
        item.trivia.comment_ws, item.trivia.comment = old.trivia.comment_ws, old.trivia.comment
    return item
