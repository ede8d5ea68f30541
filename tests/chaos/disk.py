"""A disk that is full from a chosen write on. It stands below everything that Python writes with, at the real files.

Counted is every call that asks the disk for room under the watched folders: opening a new file, each write of a file object
down at its descriptor (`io.FileIO`, which buffers and text wrappers end in), `os.write`, `os.sendfile`, making a folder, a
name or a link, `fsync`. Reading and removing always work.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from whitetuner import recipe
from whitetuner.runs import board


@dataclass(frozen=True, order=True)
class Write:
    """One call: what it does, the file with numbers made equal, and the how-manieth of its kind."""

    call: str
    file: str
    number: int


@dataclass
class Disk:
    """folders: what lies on it; full_at: the call that finds it full (None: none does); stays: and every later one, too;
    reason: the errno it answers with."""

    folders: Sequence[Path]
    full_at: Write | None = None
    stays: bool = True
    reason: int = errno.ENOSPC
    seen: list[Write] = field(default_factory=list)
    hit: bool = False
    _count: Counter[tuple[str, str]] = field(default_factory=Counter)
    _open: dict[int, str] = field(default_factory=dict)

    def file(self, path: Any) -> str | None:
        """The name of a watched file, without what differs from run to run; None for others."""
        try:
            text = str(Path(os.fsdecode(path)).absolute())
        except TypeError:
            return None
        for folder in self.folders:
            if text.startswith(f"{folder}{os.sep}"):
                inner = text[len(str(folder)) + 1 :]
                for pattern, plain in _ALIKE:
                    inner = re.sub(pattern, plain, inner)
                return inner
        return None

    def asks(self, call: str, name: str | None) -> bool:
        """Counts the call; True when there is no room for it."""
        if name is None:
            return False
        self._count[call, name] += 1
        one = Write(call, name, self._count[call, name])
        self.seen.append(one)
        if one == self.full_at:
            self.hit = True
            return True
        return self.hit and self.stays

    def refusal(self, path: Any = None) -> OSError:
        named = [] if path is None else [os.fsdecode(path)]
        return OSError(self.reason, os.strerror(self.reason), *named)

    @property
    def takes_half(self) -> bool:
        """A disk takes what it can before it is full, and refuses the rest with the next call."""
        return self.reason == errno.ENOSPC and self.full_at == self.seen[-1]

    def opened(self, handle: int, path: Any) -> None:
        name = self.file(path)
        if name is not None:
            self._open[handle] = name

    def closed(self, handle: int) -> None:
        self._open.pop(handle, None)

    def of(self, handle: int) -> str | None:
        return self._open.get(handle)


#: Numbers of processes, hashes and times, which differ from run to run.
_ALIKE = (
    (r"\.\d+(\.\d+)+\.tmp", ".N.tmp"),
    (r"/[0-9a-f]{2}(?=/|$)", "/NN"),
    (r"[0-9a-f]{16,}|\d{3,}", "N"),
    (r"(out\.tfevents\.N).*", r"\1"),
)


@contextmanager
def on(disk: Disk) -> Iterator[Disk]:
    """Everything under the disk's folders is written to it, as long as this lasts."""
    real_open, real_os = io.open, {name: getattr(os, name) for name in _CALLS}

    class Raw(io.FileIO):
        def __init__(self, file: Any, mode: str) -> None:
            if disk.asks("create" if not Path(file).exists() else "open", disk.file(file)):
                raise disk.refusal(file)
            super().__init__(file, mode)
            disk.opened(self.fileno(), file)

        def write(self, data: Any) -> int:
            if disk.asks("write", disk.file(self.name)):
                half = bytes(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
                if half and disk.takes_half:
                    return super().write(half)
                raise disk.refusal()
            return super().write(data)

        def close(self) -> None:
            if not self.closed:
                disk.closed(self.fileno())
            super().close()

    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or disk.file(file) is None:
            return real_open(file, mode, buffering, *rest, **named)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffer
        names = ("encoding", "errors", "newline")
        wrapper = io.TextIOWrapper(
            buffer, **{**dict(zip(names, rest)), **{k: named[k] for k in names if k in named}}
        )
        wrapper.mode = mode  # type: ignore[misc]
        return wrapper

    def os_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        makes = flags & os.O_CREAT and not Path(path).exists()
        if makes and disk.asks("create", disk.file(path)):
            raise disk.refusal(path)
        handle = real_os["open"](path, flags, *rest, **named)
        disk.opened(handle, path)
        return handle

    def os_close(handle: int) -> None:
        disk.closed(handle)
        real_os["close"](handle)

    def os_write(handle: int, data: Any) -> int:
        if disk.asks("write", disk.of(handle)):
            half = bytes(data)[: len(data) // 2]
            if half and disk.takes_half:
                return int(real_os["write"](handle, half))
            raise disk.refusal()
        return int(real_os["write"](handle, data))

    def by_handle(name: str, which: int) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            if disk.asks(name, disk.of(given[which])):
                raise disk.refusal()
            return real_os[name](*given)

        return call

    def by_path(name: str, which: int) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            there = name == "mkdir" and Path(given[which]).is_dir()
            if not there and disk.asks(name, disk.file(given[which])):
                raise disk.refusal(given[which])
            return real_os[name](*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        # How often is written must not hang on how fast the machine is at this moment.
        patch.setattr(recipe, "PROGRESS_EVERY_S", float("inf"))
        patch.setattr(board, "FLUSH_S", 0.0)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "open", os_open)
        patch.setattr(os, "close", os_close)
        patch.setattr(os, "write", os_write)
        patch.setattr(os, "fsync", by_handle("fsync", 0))
        if hasattr(os, "sendfile"):
            patch.setattr(os, "sendfile", by_handle("sendfile", 0))
        for name in ("mkdir", "rename", "replace", "link"):
            patch.setattr(os, name, by_path(name, 0 if name == "mkdir" else 1))
        yield disk


_CALLS = ("open", "close", "write", "fsync", "sendfile", "mkdir", "rename", "replace", "link", "truncate")
