"""A TOML text -> its values and the line of each key; errors in the user's words."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from whitetuner.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


def read_text(path: Path) -> str:
    """The text of a config file, BOM and CRLF taken away. Raises UserError when it cannot be had."""
    if path.is_dir():
        raise UserError(
            "this is a folder, not a config file",
            where=str(path),
            mend="give the .toml file, e.g. {example}",
            example=path / "config.toml",
        )
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        near = sorted(one.name for one in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise UserError(
            "there is no such file",
            where=str(path),
            mend="the folder has: {near}" if near else "`whitetuner init` writes one",
            near=", ".join(near[:5]),
        ) from error
    except OSError as error:
        raise UserError(
            "it cannot be read ({reason})", where=str(path), mend="make it readable", reason=error
        ) from error
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            "the file is not UTF-8 (line {line})",
            where=str(path),
            mend="save it as UTF-8 in your editor",
            line=data[: error.start].count(b"\n") + 1,
        ) from error


def parse(text: str, where: str) -> dict[str, Any]:
    """The values. Raises UserError with the line; a backslash in a "..." string is explained."""
    try:
        return tomllib.loads(text)
    except (RecursionError, ValueError) as error:  # besides what is no TOML: thousands of brackets or digits
        found = re.search(r"line (\d+)", str(error))
        number = int(found[1]) if found else 0
        lines = text.split("\n")
        line = lines[number - 1].strip() if 0 < number <= len(lines) else ""
        path = re.search(r'"([^"]*\\[^"]*)"', line)
        if path:
            raise UserError(
                'in "..." a backslash begins an escape: {line}',
                where=f"{where} line {number}",
                mend="write the path in single quotes: '{path}'",
                line=line,
                path=path[1],
            ) from error
        raise UserError(
            "this is not TOML: {reason}{line}",
            where=f"{where} line {number}" if number else where,
            mend="texts stand in quotes, tables in [brackets], one `key = value` a line",
            reason=re.sub(r" \(at .*\)$", "", str(error)),
            line=f": {line}" if line else "",
        ) from error


def key_lines(text: str) -> dict[str, int]:
    """Dotted key -> line number; entries of [[data.sets]] are data.sets[0], data.sets[1], ...

    For messages only: keys in inline tables are not found, their table is.
    """
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    table, inside = "", ""
    for number, line in enumerate(text.split("\n"), 1):
        if inside:  # of a text over several lines
            inside = "" if inside in line else inside
            continue
        several = re.match(r"\s*\[\[\s*([^\]]+?)\s*\]\]", line)
        single = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$", line)
        key = re.match(r'\s*([A-Za-z0-9_."-]+)\s*=', line)
        if several:
            counts[several[1]] = counts.get(several[1], -1) + 1
            table = f"{several[1]}[{counts[several[1]]}]"
            found.setdefault(table, number)
        elif single:
            table = single[1]
            found.setdefault(table, number)
        elif key:
            found.setdefault(f"{table}.{key[1]}" if table else key[1], number)
            opened = re.search(r"('''|\"\"\")", line)
            if opened and line.count(opened[1]) == 1:
                inside = opened[1]
    return found


def value_of(text: str) -> Any:
    """A value given on the command line: TOML first, plain text else."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
