"""Small pictures for the page: made when they are first seen, kept in the page's own folder, never beside the user's files."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from threading import BoundedSemaphore

from whitetuner.data.media import read
from whitetuner.data.video import frames_of, is_clip
from whitetuner.records import Size
from whitetuner.runs.files import write_atomically
from whitetuner.runs.film import contact_sheet

#: Longer side in pixels: of the grid, of one looked at.
SIDES = (256, 1024)
#: Frames of a video that are shown.
_SHEET = 8
#: So many are kept; then the oldest half goes.
_KEPT = 20_000
#: Decoding large photos takes hundreds of megabytes: two at a time.
_TWO = BoundedSemaphore(2)


class Thumbs:
    """folder: where they are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "thumbs"

    def get(self, path: Path, side: int, frames: Sequence[int] = (), size: Size | None = None) -> bytes:
        """WebP of a picture, at most `side` pixels wide and high; of a video: a contact sheet of frames of it.

        size: what the frames are cut to; None: whole

        Raises UserError when it cannot be read.
        """
        side = min(SIDES, key=lambda one: abs(one - side))
        size = None if size is None else size._replace(frames=1)
        kept = self._file(path, side, frames, size)
        try:
            return kept.read_bytes()
        except OSError:
            pass  # not made yet
        with _TWO:
            if is_clip(path):
                chosen = _spread(frames) or [0]
                image = contact_sheet(frames_of(path, chosen, size), chosen)
            else:
                image = read(path, Size(side, side))
            image.thumbnail((side, side))
            stream = io.BytesIO()
            image.save(stream, "WEBP", quality=80, method=2)
        with contextlib.suppress(OSError):  # a full disk costs time, not the picture
            write_atomically(kept, stream.getvalue())
        return stream.getvalue()

    def tidy(self) -> None:
        """Lets the oldest half go when there are too many."""
        files = [one for one in self.folder.glob("*/*.webp") if one.is_file()]
        if len(files) > _KEPT:
            for one in sorted(files, key=lambda file: file.stat().st_mtime)[: len(files) // 2]:
                one.unlink(missing_ok=True)

    def _file(self, path: Path, side: int, frames: Sequence[int], size: Size | None) -> Path:
        how = f"{side}|{list(frames)}" + ("" if size is None else f"|{size.width}x{size.height}")
        try:
            stat = path.stat()
            mark = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{how}"
        except OSError:
            mark = f"{path}|{how}"
        name = hashlib.sha256(mark.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.webp"


def _spread(frames: Sequence[int]) -> list[int]:
    """The first, the last, and some between."""
    count = min(_SHEET, len(frames))
    return [frames[round(index * (len(frames) - 1) / max(1, count - 1))] for index in range(count)]
