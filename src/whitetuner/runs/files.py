"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes beside, syncs, renames. Text is written as UTF-8 with "\\n"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def inside(folder: Path, place: str | Path) -> Path | None:
    """The file at a place within a folder, links followed; None when it lies elsewhere, is no file, or no path at all."""
    try:
        path = (folder / place).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # may not be looked at, a circle of links, a zero byte
        return None


def replace(source: Path, target: Path) -> None:
    """os.replace; on Windows tried again for a second, since a virus scanner or an indexer may hold the target open."""
    for attempt in range(10):
        with contextlib.suppress(PermissionError):
            source.replace(target)
            return
        if os.name != "nt" or attempt == 9:
            break
        time.sleep(0.1)
    source.replace(target)


def _sync_folder(folder: Path) -> None:
    """The new name onto the disk, too; Windows does that by itself and opens no folders."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
