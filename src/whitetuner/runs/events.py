"""What happened in a run: one JSON line each, appended to events.jsonl. Console, TensorBoard, report and page only read it.

The fields are written down in docs/run-folder.md.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from whitetuner.runs.files import write_atomically

Ending = Literal["finished", "stopped"]
Level = Literal["info", "warning"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """time: seconds since 1970 by this machine's clock, for people; nothing is computed from it."""

    kind: ClassVar[str] = "event"
    time: float = field(
        default_factory=lambda: time.time()
    )  # looked up each time: clocks jump, in tests on purpose


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """resumed_from: step of the checkpoint; steps: of the whole run; pid: of the process that writes."""

    kind: ClassVar[str] = "run_started"
    name: str
    resumed_from: int | None = None
    steps: int | None = None
    pid: int = field(default_factory=os.getpid)


@dataclass(frozen=True, kw_only=True)
class Phase(Event):
    """name: scan, "cache NAME" for each encoder, load, train, export; total: how much there is to do."""

    kind: ClassVar[str] = "phase"
    name: str
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """done of total, within the phase that was announced."""

    kind: ClassVar[str] = "progress"
    phase: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """loss: mean of losses (unweighted); seconds: of the step alone; samples: pictures in it; weight_change: root mean square
    distance of the trained numbers from the start; memory_mb: peak device memory, on a CPU the resident memory."""

    kind: ClassVar[str] = "step"
    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    samples: int
    sigmas: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weight_change: float = 0.0
    memory_mb: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Preview(Event):
    """files: relative to the run's folder, one per prompt."""

    kind: ClassVar[str] = "preview"
    step: int
    files: list[str]
    prompts: list[str]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """path: of the checkpoint, relative to the run's folder."""

    kind: ClassVar[str] = "saved"
    step: int
    path: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Validation(Event):
    """by_sigma: noise level as text -> loss; held_out: the pictures are not trained on; by_picture: FOLDER/FILE -> loss,
    the highest first."""

    kind: ClassVar[str] = "validation"
    step: int
    loss: float
    by_sigma: dict[str, float]
    seconds: float
    held_out: bool = False
    by_picture: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Message(Event):
    """A line for the user."""

    kind: ClassVar[str] = "message"
    level: Level
    text: str


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """reason: the whole message, as the terminal shows it."""

    kind: ClassVar[str] = "failed"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """The last event of a run that ended by itself; step: the last one done."""

    kind: ClassVar[str] = "ended"
    status: Ending
    step: int


KINDS: dict[str, type[Event]] = {
    one.kind: one
    for one in (RunStarted, Phase, Progress, StepDone, Preview, Saved, Validation, Message, Failed, Ended)
}


def as_line(event: Event) -> str:
    """One line of JSON; numbers that JSON does not know (NaN, infinity) become null."""
    return json.dumps({"kind": event.kind, **_finite(dataclasses.asdict(event))}, ensure_ascii=False) + "\n"


_FIELDS = {kind: {one.name: one.type for one in dataclasses.fields(cls)} for kind, cls in KINDS.items()}


def from_line(line: str) -> Event | None:
    """The event of a line, null numbers as NaN; None for a torn line, an unknown kind or one of another version."""
    try:
        values = json.loads(line)
        kind = values.pop("kind")
        known = _FIELDS[kind]
        if "null" in line:  # seldom, and a run may have 200,000 lines
            values = {key: _number(known.get(key), value) for key, value in values.items()}
        given = {key: value for key, value in values.items() if key in known}
        fits = all(_IS[known[key]](value) and _holds(key, value) for key, value in given.items())
        return KINDS[kind](**given) if fits else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


#: A run's folder may come from anybody, and those who show it reckon with its numbers: what none of ours can be is torn.
_MOST = 1e15


#: What clocks and meters say is a number in any case: field -> below what (the year 2984: every calendar has it).
_METERS = {"time": 32_000_000_000.0, "seconds": 1e9, "memory_mb": 1e12}


def _holds(key: str, value: Any) -> bool:
    return key not in _METERS or 0 <= value < _METERS[key]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and (value != value or -_MOST < value < _MOST)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and -_MOST < value < _MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


#: Annotation of a field -> whether a value is one.
_IS: dict[Any, Callable[[Any], bool]] = {
    "str": _is_text,
    "Ending": lambda value: value in get_args(Ending),
    "Level": lambda value: value in get_args(Level),
    "int": _is_count,
    "int | None": lambda value: value is None or _is_count(value),
    "float": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "list[str]": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "list[float]": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "dict[str, float]": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
}


def _number(annotation: Any, value: Any) -> Any:
    """What JSON could not say (see `as_line`) comes back as NaN."""
    nan = float("nan")
    if value is None:
        return nan if annotation == "float" else None
    if annotation == "list[float]":
        return [nan if one is None else one for one in value]
    if annotation == "dict[str, float]":
        return {key: nan if one is None else one for key, one in value.items()}
    return value


class EventLog:
    """Appends events; each is one write, so a kill leaves at most one torn line, which the next start cuts off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> None:
        """Raises OSError when the line does not fit on the disk; nothing of it stays then."""
        line = as_line(event).encode("utf-8", "surrogatepass")
        handle = os.open(
            self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644
        )
        try:
            written = os.write(handle, line)
            if written < len(line):
                os.ftruncate(handle, os.fstat(handle).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)

    def sync(self) -> None:
        """Onto the disk: what a power cut leaves of the file is then at least this. Raises OSError as `append`."""
        if not self.path.exists():
            return
        handle = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def mend(self) -> None:
        """Cuts a torn last line off."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            back = min(size, 1 << 20)
            file.seek(size - back)
            tail = file.read(back)
            if tail and not tail.endswith(b"\n"):
                file.truncate(size - back + tail.rfind(b"\n") + 1)

    def cut_after(self, step: int) -> None:
        """Leaves what happened up to and with this step (0: nothing): the rest will happen again.

        A kill may come after a checkpoint was renamed into place and before its `saved` line was written, so it is the
        steps that count, not that line.
        """
        if not self.path.exists():
            return
        lines = self.path.read_bytes().split(b"\n")[:-1]
        end = 0
        for index, line in enumerate(lines if step > 0 else []):
            event = from_line(line.decode("utf-8", "replace"))
            if isinstance(event, StepDone) and event.step > step:
                break
            if isinstance(event, (StepDone, Preview, Validation, Saved)):
                end = index + 1
        write_atomically(self.path, b"".join(line + b"\n" for line in lines[:end]))


def read(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """(events from this byte on, the byte after the last whole line).

    A file that got shorter was cut for a resume: it is read from its beginning, so the second value is then below what
    was asked for or the events begin with `run_started` anew.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            offset = 0 if offset > size else offset
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], 0
    end = data.rfind(b"\n") + 1
    found = (from_line(line.decode("utf-8", "replace")) for line in data[:end].split(b"\n") if line)
    return [event for event in found if event is not None], offset + end


def last_of(path: Path, kinds: tuple[type[Event], ...], block: int = 1 << 16) -> Event | None:
    """The last event of one of these kinds, found from the end; lines of others are passed over without being parsed."""
    marks = [f'{{"kind": "{kind.kind}"'.encode() for kind in kinds]
    try:
        with path.open("rb") as file:
            start, rest = file.seek(0, os.SEEK_END), b""
            while start > 0:
                size = min(block, start)
                start -= size
                file.seek(start)
                text = file.read(size) + rest
                first = text.find(b"\n") + 1 if start > 0 else 0
                if start > 0 and first == 0:  # the middle of a long line
                    rest = text
                    continue
                rest = text[:first]
                if not any(mark in text for mark in marks):
                    continue
                for line in reversed(text[first:].split(b"\n")):
                    event = (
                        from_line(line.decode("utf-8", "replace")) if line.startswith(tuple(marks)) else None
                    )
                    if isinstance(event, kinds):
                        return event
    except FileNotFoundError:
        return None
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(one) for one in value]
    return value
