"""One copy of the masters for all processes of a machine: read and quantised by one of them, mapped by the others.

On Linux it is memory without a name in any folder (memfd), which a small /dev/shm does not bound and which goes with the
last process, however that ends. Where the others cannot reach it (containers that do not see each other's processes), it
is a file in /dev/shm, removed as soon as all have mapped it; on Windows a named mapping of the page file.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from whitetuner.errors import EXIT_FAILED, UserError

_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Link:
    """How the processes that share an arena speak with each other. leader: fills it; others: how many map it.

    say: a word under a key;  from_leader, from_all: what was said under a key, by the leader or each of them, once it is
    """

    leader: bool
    others: int
    say: Callable[[str, str], None]
    from_leader: Callable[[str], str]
    from_all: Callable[[str], list[str]]


@dataclass
class Arena:
    """The masters of one model. kind: see `kind_for`; bytes_mapped: 0 until `masters` was asked for."""

    link: Link
    kind: str
    bytes_mapped: int = 0
    _pages: list[mmap.mmap] = field(default_factory=list)
    _unlink: str = ""

    @property
    def leader(self) -> bool:
        return self.link.leader

    def masters(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Flat uint8 tensors of these sizes, shared; of zeros for the leader, who is to fill them. Once.

        Raises UserError when the machine has no room for them.
        """
        self.bytes_mapped = sum(sizes)
        if self.bytes_mapped == 0:
            return [torch.empty(0, dtype=torch.uint8) for _ in sizes]
        if self.leader:
            pages, name = create(self.kind, self.bytes_mapped)
            self._unlink = name if self.kind == "file" else ""
            self.link.say("name", json.dumps([name, self.bytes_mapped]))
        else:
            name, total = json.loads(self.link.from_leader("name"))
            assert total == self.bytes_mapped, "ranks have other layouts"
            pages = attach(self.kind, name, total)
        self.link.say("mapped", "1")
        self._pages.append(pages)
        whole = torch.frombuffer(pages, dtype=torch.uint8)
        found, start = [], 0
        for size in sizes:
            found.append(whole[start : start + size])
            start += size
        return found

    def filled(self) -> None:
        """The leader has written everything; comes back for the others when that is so."""
        if not self.leader:
            self.link.from_leader("filled")
            return
        self.link.say("filled", "1")
        if self._unlink:
            self.link.from_all("mapped")
            with contextlib.suppress(OSError):
                Path(self._unlink).unlink()

    def sentence(self) -> str:
        gb = self.bytes_mapped / 1e9
        return f"one copy of them for the {self.link.others + 1} ranks of this machine ({gb:.2f} GB)"


@dataclass(frozen=True)
class Arenas:
    """One for each denoiser of a run. kind: of memory; link_of: the processes that share one, by the denoiser's name"""

    kind: str
    link_of: Callable[[str], Link]
    leader: bool

    def of(self, name: str) -> Arena:
        return Arena(self.link_of(name), self.kind)


def kind_for(probe: Link, needed_bytes: int, room: Callable[[], int] | None = None) -> tuple[str, str]:
    """(how memory can be shared here: "memfd", "file", "named" or "" for not at all; why not).

    Asked by all that would share it at once. room: free bytes of /dev/shm, for tests.
    """
    kinds = (
        ["named"]
        if sys.platform == "win32"
        else ["memfd", "file"]
        if hasattr(os, "memfd_create")
        else ["file"]
    )
    why = ""
    for number, kind in enumerate(kinds):
        if kind == "file":
            free = (room or _room)()
            enough = _agree(probe, f"room/{number}", free > needed_bytes)
            if not enough:
                why = f"{_folder()} has {free / 1e9:.1f} GB free, the model needs {needed_bytes / 1e9:.1f}"
                continue
        if _reached(probe, kind, f"probe/{number}"):
            return kind, ""
        why = "the ranks do not see each other's memory"
    return "", why


def _reached(link: Link, kind: str, key: str) -> bool:
    """A page written by the leader is read by all others."""
    word = secrets.token_bytes(16)
    if link.leader:
        pages, name = create(kind, mmap.PAGESIZE)
        pages[:16] = word
        link.say(key, json.dumps([name, word.hex()]))
        good = _agree(link, key, True)
        if kind == "file":
            Path(name).unlink(missing_ok=True)
        return good
    name, told = json.loads(link.from_leader(key))
    try:
        seen = bytes(attach(kind, name, mmap.PAGESIZE)[:16]).hex() == told
    except (OSError, ValueError):
        seen = False
    return _agree(link, key, seen)


def _agree(link: Link, key: str, mine: bool) -> bool:
    """All of them said yes."""
    link.say(f"{key}/agreed", "yes" if mine else "no")
    return set(link.from_all(f"{key}/agreed")) == {"yes"}


def create(kind: str, num_bytes: int) -> tuple[mmap.mmap, str]:
    """(zeroed memory, the name under which another process finds it). Raises UserError when there is no room for it."""
    try:
        if kind == "named":
            name = f"whitetuner-{secrets.token_hex(8)}"
            return mmap.mmap(-1, num_bytes, tagname=name), name  # type: ignore[call-arg]
        if kind == "memfd":
            handle = os.memfd_create("whitetuner")  # stays open: others open it through this process
            name = f"/proc/{os.getpid()}/fd/{handle}"
            os.ftruncate(handle, num_bytes)
            return _map(handle, num_bytes), name
        name = str(_folder() / f"whitetuner-{secrets.token_hex(8)}")
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, num_bytes)  # now, not as a SIGBUS in the middle of loading
            else:
                os.ftruncate(handle, num_bytes)
            return _map(handle, num_bytes), name
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(
            "the machine gives no {gb:.1f} GB of shared memory for the weights that wait on the host ({reason})",
            where="the host's memory",
            mend="close other programs; in a container raise its memory and its shared memory (docker: --shm-size)",
            code=EXIT_FAILED,
            gb=num_bytes / 1e9,
            reason=error.strerror or error,
        ) from error


def attach(kind: str, name: str, num_bytes: int) -> mmap.mmap:
    """The memory that another process created. Raises OSError or ValueError when it cannot be reached."""
    if kind == "named":
        return mmap.mmap(-1, num_bytes, tagname=name)  # type: ignore[call-arg]
    handle = os.open(name, os.O_RDWR)
    try:
        return _map(handle, num_bytes)
    finally:
        os.close(handle)


def _map(handle: int, num_bytes: int) -> mmap.mmap:
    pages = mmap.mmap(handle, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # kernels without huge pages for shared memory
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _folder() -> Path:
    return _SHM if _SHM.is_dir() else Path(tempfile.gettempdir())


def _room() -> int:
    return shutil.disk_usage(_folder()).free
