"""A run's events as TensorBoard curves. The format comes with tensorboard itself; torch is not needed for it.

Its own file writer is not used: it writes from a thread of its own, whose death on a full disk nobody hears of.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from whitetuner.errors import UserError
from whitetuner.runs import events
from whitetuner.runs.scalars import scalars

#: Seconds until what is written can be seen; a kill loses so much of the curves (never of events.jsonl).
FLUSH_S = 5


class Board:
    """Listener of a run that writes tensorboard/train_{steps}steps_{gpus}gpu_{time}/ inside the run's folder.

    warn: told of last curves that could not be written
    """

    def __init__(
        self, folder: Path, steps: int, gpus: int = 1, warn: Callable[[str], None] = lambda text: None
    ) -> None:
        stamp = time.strftime("%Y%m%d_%H%M%S")
        self.folder = folder / f"train_{steps}steps_{gpus}gpu_{stamp}"
        self.writer: Any = None
        self.warn = warn
        self._flushed = 0.0
        self._lost = False

    def __call__(self, event: events.Event) -> None:
        """Raises OSError when the disk does not take it; nothing more is written then."""
        point = scalars(event)
        if point is not None:
            self._write(event, *point)
        elif isinstance(event, (events.Ended, events.Failed)):
            self.close()

    def close(self) -> None:
        """The run is over by now, and its events have the curves: last ones that do not fit on the disk are a warning."""
        if self.writer is not None:
            writer, self.writer = self.writer, None
            try:
                writer.close()
            except OSError as error:
                with contextlib.suppress(UserError):  # not even that can be written
                    self.warn(f"tensorboard cannot be written ({error.strerror or error})")

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        """After a write that failed there is no second one: what it left in the buffer would fail once more."""
        try:
            yield
        except OSError:
            self._lost, self.writer = True, None
            raise

    def _write(self, event: events.Event, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._lost:
            return
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        with self._dropped():
            if self.writer is None:
                self.writer = self._begun()
                first = Event(wall_time=event.time, file_version="brain.Event:2")
                self.writer.write(first.SerializeToString())
            line = Event(step=step, wall_time=event.time, summary=summary)
            self.writer.write(line.SerializeToString())
            now = time.monotonic()
            if now - self._flushed >= FLUSH_S:
                self._flushed = now
                self.writer.flush()

    def _begun(self) -> Any:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        # Two visits within a second, of one process even, must not meet in one file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}.{time.monotonic_ns()}"
        return RecordWriter(_Whole(self.folder / name))


class _Whole:
    """A file whose buffer is dropped, not written once more, when the disk is full: a half record would end all reading."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, bytearray()
        path.touch(exist_ok=False)

    def write(self, data: bytes) -> None:
        self.waiting += data

    def flush(self) -> None:
        waiting, self.waiting = bytes(self.waiting), bytearray()
        size = self.path.stat().st_size
        try:
            with self.path.open("ab", buffering=0) as file:
                written = file.write(waiting)
            if written != len(waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise

    def close(self) -> None:
        self.flush()
