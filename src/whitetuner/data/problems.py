"""What is wrong with the files of a data set: collected, to tell everything at once, and merged, to tell it briefly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from whitetuner.errors import UserError, UserErrors

Level = Literal["error", "warning", "note"]

#: How many files a message names before it says "and N more".
NAMED = 5


@dataclass(frozen=True)
class Problem:
    """One finding. kind: stable word for programs ("truncated"); error: its text; an "error" stops a run, others don't."""

    kind: str
    level: Level
    path: Path
    error: UserError

    def __str__(self) -> str:
        return str(self.error)


def merged(problems: Iterable[Problem], folder: Path | None = None) -> list[UserError]:
    """Findings that read the same become one message that names the first five files and counts the rest.

    folder: names are shown relative to it where they lie inside.
    """
    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.kind, problem.error.what, problem.error.mend), []).append(problem)
    told: list[UserError] = []
    per_kind: dict[str, int] = {}
    for (kind, _, _), group in groups.items():
        per_kind[kind] = per_kind.get(kind, 0) + 1
        if per_kind[kind] <= NAMED:
            first = group[0].error
            where = _names([problem.path for problem in group], folder)
            told.append(
                UserError(
                    first.what_template,
                    where=where,
                    mend=first.mend_template,
                    code=first.code,
                    **first.values,
                )
            )
    hidden = sum(count - NAMED for count in per_kind.values() if count > NAMED)
    if hidden:
        told.append(
            UserError(
                "{count} more findings like these", mend="`whitetuner check` lists them all", count=hidden
            )
        )
    return told


def refuse(problems: Iterable[Problem], folder: Path | None = None) -> None:
    """Raises UserErrors with every finding of level "error"; does nothing when there is none."""
    errors = merged((problem for problem in problems if problem.level == "error"), folder)
    if errors:
        raise UserErrors(errors)


def _names(paths: list[Path], folder: Path | None) -> str:
    def short(path: Path) -> str:
        return (
            str(path.relative_to(folder)) if folder is not None and path.is_relative_to(folder) else str(path)
        )

    if len(paths) == 1:
        return str(paths[0])
    text = ", ".join(short(path) for path in paths[:NAMED])
    more = len(paths) - NAMED
    if more > 0:
        text += f" (+{more})"
    return f"{folder}: {len(paths)} x: {text}" if folder is not None else f"{len(paths)} x: {text}"
