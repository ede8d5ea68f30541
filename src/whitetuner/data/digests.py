"""Content hashes of many files, read in parallel and remembered until a file changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from whitetuner.data.media import naming

#: Files changed less than this before they were hashed are hashed again next time: a second change within the clock's grain
#: would leave size and time as they are (FAT counts in 2 s).
SETTLED_S = 3.0

_READ_BYTES = 1 << 20


def file_digest(path: Path) -> str:
    """BLAKE2b of the content, 32 hex digits. Raises UserError when the file cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    with naming(path), path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def digest_of(content: bytes) -> str:
    """The digest of a file with this content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digests(
    paths: Sequence[Path],
    index_folder: Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Digest of every file, in order. index_folder: where they are remembered (by size and time of change),
    None: nowhere.

    Raises UserError for the first file that cannot be read.
    """
    wanted = list(dict.fromkeys(paths))
    indexes = {folder: _Index(folder, index_folder) for folder in {path.parent for path in wanted}}
    known = {path: indexes[path.parent].get(path) for path in wanted}
    missing = [path for path in wanted if known[path] is None]
    began = time.time()
    with ThreadPoolExecutor(workers or _workers()) as pool:
        for done, (path, digest) in enumerate(
            zip(missing, pool.map(file_digest, missing), strict=True), start=1
        ):
            known[path] = digest
            indexes[path.parent].put(path, digest, began)
            if progress is not None:
                progress(done, len(missing))
    for index in indexes.values():
        index.save()
    return [known[path] or "" for path in paths]


def _workers() -> int:
    return min(
        8, (os.cpu_count() or 1) + 2
    )  # a few more than cores: part of the time is waiting for the disk


class _Index:
    """What was hashed of one folder: file name -> size in bytes, times of change in ns, digest.

    The second time is the system's own (on Windows: of creation), which a copy that keeps the first does not keep.

    Several processes may write it at once; the last one wins and what it lacks is hashed again.
    """

    def __init__(self, folder: Path, index_folder: Path | None) -> None:
        name = hashlib.blake2b(
            str(folder.resolve()).encode("utf-8", "surrogatepass"), digest_size=10
        ).hexdigest()
        self.path = index_folder / f"{name}.json" if index_folder is not None else None
        self.changed = False
        self.rows: dict[str, list[object]] = {}
        if self.path is not None and self.path.exists():
            try:
                rows = json.loads(self.path.read_text(encoding="utf-8"))
            except (ValueError, OSError):
                rows = {}  # torn by a crash: everything is hashed anew
            self.rows = rows if isinstance(rows, dict) else {}

    def get(self, path: Path) -> str | None:
        row = self.rows.get(path.name)
        if not (isinstance(row, list) and len(row) == 4):
            return None
        with naming(path):
            stat = path.stat()
        return str(row[3]) if row[:3] == [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] else None

    def put(self, path: Path, digest: str, began: float) -> None:
        with naming(path):
            stat = path.stat()
        if max(stat.st_mtime, stat.st_ctime) < began - SETTLED_S:
            self.rows[path.name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, digest]
            self.changed = True

    def save(self) -> None:
        if self.path is None or not self.changed:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.rows), encoding="utf-8")
            temporary.replace(self.path)
        except OSError:
            # only a shortcut: a full disk, or a folder that cannot be written, is told by what needs it
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
