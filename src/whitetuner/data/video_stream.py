"""A clip's frames one after the other, decoded while those before are used: a few of them are held, however long it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import overload

from PIL import Image

from whitetuner.data.video import decoded, frames_of, read_frames
from whitetuner.records import Size

#: Frames decoded before they are asked for: as many as a video VAE takes at a time.
AHEAD = 4


class FrameStream(Sequence[Image.Image]):
    """As `frames_of`, but decoded while it is walked through; a walk begins anew each time. Raises UserError on the way.

    wanted: frames of the source, never falling. One asked for by its number is decoded alone.
    """

    def __init__(self, path: Path, wanted: Sequence[int], size: Size) -> None:
        assert wanted and list(wanted) == sorted(wanted), "a clip runs forward"
        self.path, self.wanted, self.size = path, tuple(wanted), size
        self._begun: _Ahead | None = None

    def start(self) -> None:
        """A thread decodes the first frames of the next walk, and goes on while it is walked."""
        if self._begun is None:
            self._begun = _Ahead(self._frames())

    def __iter__(self) -> Iterator[Image.Image]:
        begun, self._begun = self._begun, None
        return self._frames() if begun is None else begun.walk()

    def __len__(self) -> int:
        return len(self.wanted)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return frames_of(self.path, self.wanted[index], self.size)
        return frames_of(self.path, [self.wanted[index]], self.size)[0]

    def _frames(self) -> Generator[Image.Image]:
        source = read_frames if self.path.is_dir() else decoded
        places = deque(self.wanted)
        for index, picture in source(self.path, sorted(set(self.wanted)), self.size):
            while places and places[0] == index:  # shown twice where the source is slower than the model
                places.popleft()
                yield picture


class _Ahead:
    """A few frames of a generator, made by a thread."""

    def __init__(self, frames: Generator[Image.Image]) -> None:
        self._frames = frames
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="frames")
        self._waiting: deque[Future[Image.Image | None]] = deque(self._next() for _ in range(AHEAD))

    def _next(self) -> Future[Image.Image | None]:
        return self._pool.submit(next, self._frames, None)

    def walk(self) -> Iterator[Image.Image]:
        try:
            while (picture := self._waiting.popleft().result()) is not None:
                self._waiting.append(self._next())
                yield picture
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._frames.close()
