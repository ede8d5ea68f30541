"""A run as the page shows it: read from its folder alone, in pieces as the files grow, thinned to what a screen can show.

200,000 steps are 60 MB of events: step lines are cut out by one pattern (a second in all) and not parsed one by one.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whitetuner.errors import UserError
from whitetuner.runs import events
from whitetuner.runs.best import measured
from whitetuner.runs.console import duration, phase
from whitetuner.runs.curves import smooth
from whitetuner.runs.folder import RunFolder

#: Points of a curve that are sent; lines of the log that are kept.
POINTS, LINES = 1200, 400
#: Steps that the pace is the median of.
PACE_STEPS = 50

#: Values are numbers as JSON writes them (none that a sum or a time cannot hold) or null, and have an end: a torn or spoilt line
#: is no step, and takes in nothing of what follows.
_COUNT = rb"(\d{1,15})"
_SECONDS = rb"(\d{1,9}(?:\.\d+)?(?:[eE]-\d{1,3})?)"
_NUMBER = rb"(-?\d{1,20}(?:\.\d+)?(?:[eE](?:-\d{1,3}|\+?\d{1,2}))?|null)"
_COLUMNS = {
    "step": _COUNT,
    "loss": _NUMBER,
    "lr": _NUMBER,
    "grad_norm": _NUMBER,
    "seconds": _SECONDS,
    "samples": _COUNT,
}
_STEP = re.compile(
    rb'^\{"kind": "step", "time": [-+.\w]+, '
    + rb", ".join(b'"' + name.encode() + b'": ' + pattern for name, pattern in _COLUMNS.items())
    + rb"(?=[,}])",
    re.MULTILINE,
)
_OTHER = re.compile(rb'^(?!\{"kind": "step")[^\n]+', re.MULTILINE)
Numbers = NDArray[np.float64]


class Reader:
    """One run's events. `look` takes in what came since; everything else tells of what was seen."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._best: tuple[int, int | None] | None = None
        self._clear()

    def _clear(self) -> None:
        self._offset = 0
        self._file: tuple[int, int] | None = None
        self.rows: Numbers = np.empty((0, len(_COLUMNS)))
        self.last_step: events.StepDone | None = None
        self.started: events.RunStarted | None = None
        self.phase: events.Phase | None = None
        self.progress: events.Progress | None = None
        self.end: events.Ended | events.Failed | None = None
        self.previews: dict[int, events.Preview] = {}
        self.validations: dict[int, events.Validation] = {}
        self.saved: dict[int, events.Saved] = {}
        self.messages: deque[events.Message] = deque(maxlen=100)
        self.lines: deque[str] = deque(maxlen=LINES)
        self.version = 0

    def look(self) -> None:
        """Reads on; from the beginning when the file is another one (a resume cuts it by replacing it)."""
        with self._lock:
            try:
                with self.folder.events.open("rb") as file:
                    size, identity = file.seek(0, 2), self._identity()
                    if identity != self._file or size < self._offset:
                        self._clear()
                        self._file = identity
                    file.seek(self._offset)
                    data = file.read()
            except FileNotFoundError:
                if self._file is not None:
                    self._clear()
                return
            end = data.rfind(b"\n") + 1
            if end:
                self._offset += end
                self._take(data[:end])
                self.version += 1

    def _identity(self) -> tuple[int, int]:
        found = self.folder.events.stat()
        return found.st_dev, found.st_ino

    def _take(self, data: bytes) -> None:
        others = [event for line in _OTHER.findall(data) if (event := _event(line)) is not None]
        found = _STEP.findall(data)
        if found:
            text = b",".join(map(b",".join, found)).replace(b"null", b"nan")
            rows = np.fromstring(text, sep=",").reshape(
                -1, len(_COLUMNS)
            )  # its text mode, the fastest there is
            self.rows = np.concatenate([self.rows, rows])
            last = _event(data[data.rfind(b'{"kind": "step"') :].split(b"\n", 1)[0])
            self.last_step = last if isinstance(last, events.StepDone) else self.last_step
            self._step_lines(rows[-LINES:])
        for event in others:
            self._hear(event)

    def _step_lines(self, rows: Numbers) -> None:
        for row in rows:
            self.lines.append(f"step {int(row[0])}  loss {row[1]:.4f}  lr {row[2]:.2e}  {row[4]:.2f} s")

    def _hear(self, event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            self.started, self.end, self.phase, self.progress = event, None, None, None
            text = f"goes on from step {event.resumed_from}" if event.resumed_from else "starts"
            self.lines.append(f"{event.name}: {text}")
        elif isinstance(event, events.Phase):
            self.phase, self.progress = event, None
            self.lines.append(phase(event.name))
        elif isinstance(event, events.Progress):
            self.progress = event
        elif isinstance(event, events.Preview):
            self.previews[event.step] = event
            self.lines.append(f"step {event.step}: {len(event.files)} previews ({event.seconds:.1f} s)")
        elif isinstance(event, events.Validation):
            self.validations[event.step] = event
            self.lines.append(f"step {event.step}: validation loss {event.loss:.4f}")
        elif isinstance(event, events.Saved):
            self.saved[event.step] = event
            self.lines.append(f"step {event.step}: saved {event.path}")
        elif isinstance(event, events.Message):
            self.messages.append(event)
            self.lines.append(f"{event.level}: {event.text}")
        elif isinstance(event, (events.Ended, events.Failed)):
            self.end = event
            is_end = isinstance(event, events.Ended)
            self.lines.append(f"{event.status} at step {event.step}" if is_end else f"failed: {event.reason}")  # type: ignore[union-attr]

    # -- what the page asks ----------------------------------------------------------------------------------------

    def numbers(self, steps: int | None) -> dict[str, Any]:
        """step, loss (mean of the last 50 too), lr, s/step, samples/s, ETA, memory; {} before the first step."""
        last = self.last_step
        if last is None or not len(self.rows):
            return {}
        recent = self.rows[-PACE_STEPS:]
        pace = median(recent[:, 4].tolist())
        left = max(0, steps - last.step) * pace if steps else None
        return {
            "step": last.step,
            "loss": short(last.loss),
            "loss_mean": short(fmean(recent[:, 1].tolist())),
            "lr": short(last.lr),
            "seconds": short(pace),
            "samples": last.samples,
            "samples_per_s": short(fmean(recent[:, 5].tolist()) / max(1e-9, pace)),
            "eta": duration(left) if left is not None else "",
            "memory_mb": round(last.memory_mb),
        }

    def curve(self) -> dict[str, Any]:
        """At most POINTS stretches of the loss (lowest, highest, running mean) and lr, all validations, checkpoints, previews."""
        found: dict[str, Any] = {
            "version": self.version,
            "validation": [[one.step, short(one.loss)] for one in self.validations.values()],
            "saved": sorted(self.saved),
            "previews": sorted(self.previews),
        }
        rows = self.rows[np.isfinite(self.rows[:, 1])]
        size = max(1, -(-len(rows) // POINTS))
        at = np.arange(0, len(rows), size)
        if not len(rows):
            return {**found, "step": [], "low": [], "high": [], "smooth": [], "lr": []}
        step, loss, lr = rows[:, 0], rows[:, 1], rows[:, 2]
        count = np.diff(np.append(at, len(rows)))
        mean = np.add.reduceat(loss, at) / count
        ends = np.append(at[1:], len(rows)) - 1
        points = list(zip(step[ends].tolist(), mean.tolist()))
        return {
            **found,
            "step": step[ends].astype(int).tolist(),
            "low": _all_short(np.minimum.reduceat(loss, at)),
            "high": _all_short(np.maximum.reduceat(loss, at)),
            "smooth": [short(y) for _, y in smooth(points)],
            "lr": _all_short(lr[ends]),
        }

    def mean(self) -> dict[str, Any]:
        """Of the curve its running mean alone: {step, smooth}."""
        found = self.curve()
        return {"step": found["step"], "smooth": found["smooth"]}

    def best(self) -> int | None:
        """The step of the best checkpoint (runs/best.py), None where none was measured; looked for when one comes or goes."""
        try:
            changed = self.folder.checkpoints.stat().st_mtime_ns
            if self._best is None or self._best[0] != changed:
                found = measured(self.folder.checkpoints, self.folder.document()["run_id"])
                self._best = (changed, found[0].step if found else None)
        except (UserError, OSError):  # nothing is saved yet, or may not be read
            return None
        return self._best[1]


def log_lines(file: Path, most: int = LINES, block: int = 1 << 16) -> list[str]:
    """The last lines of a text file; a carriage return begins a line anew, as in a terminal."""
    try:
        with file.open("rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - block))
            text = handle.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines[1 if size > block else 0 :] if line.strip()][-most:]


def _event(line: bytes) -> events.Event | None:
    return events.from_line(line.decode("utf-8", "replace"))


def short(value: float) -> float | None:
    """Five digits are more than a screen shows; None for what JSON cannot say."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _all_short(values: Sequence[float] | Numbers) -> list[float | None]:
    return [short(float(value)) for value in values]
