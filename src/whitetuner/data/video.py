"""Video files and folders of numbered pictures as clips: what they say of themselves, and single frames of them.

A frame is known by its place in the order frames are shown, counted from 0, and by its time: variable rates, B-frames and edit
lists make anything else lie. Sound is passed over. Needs PyAV (the extra `video`) for files, nothing for folders.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from whitetuner.data.media import PICTURES, cut, read
from whitetuner.data.probe import Probe, probe
from whitetuner.data.problems import Problem
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.records import Size

#: Endings that are looked at as videos, in small letters.
VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
#: Videos that are not read; `check` names them.
OTHER_VIDEOS = (
    ".wmv",
    ".flv",
    ".mpg",
    ".mpeg",
    ".ts",
    ".m2ts",
    ".mts",
    ".3gp",
    ".ogv",
    ".gif",
    ".rm",
    ".vob",
)
#: Seconds that a container may promise beyond its last frame; more is missing data.
MISSING_S = 1.0
#: Part of the cache key: raised whenever the same frames of the same file would give other pixels.
CLIP_VERSION = 1

_NUMBER = re.compile(r"(\d+)(?!.*\d)")


def is_clip(path: Path) -> bool:
    """A video file by its name, or a folder (of frames)."""
    return path.suffix.lower() in VIDEOS or path.is_dir()


def look(path: Path, deep: bool = False) -> Probe:
    """Size, frames and their times; never raises for a bad file. deep: decode every frame."""
    try:
        return _look_folder(path, deep) if path.is_dir() else _look_file(path, deep)
    except UserError as error:
        return Probe(None, problem=Problem("unreadable", "error", path, error))


def frames_of(path: Path, wanted: Sequence[int], size: Size | None = None) -> tuple[Image.Image, ...]:
    """These frames, upright RGB, cut to the size (None: whole), in the order asked for; one may be asked for twice.

    Only what lies between the first and the last of them is decoded, and only these are kept.
    Raises UserError when the file cannot be read, or has no such frame any more.
    """
    source = read_frames if path.is_dir() else decoded
    found = dict(source(path, sorted(set(wanted)), size))
    return tuple(found[index] for index in wanted)


def read_frames(folder: Path, wanted: Sequence[int], size: Size | None) -> Generator[tuple[int, Image.Image]]:
    """As `decoded`, of a folder of frames."""
    files = frame_files(folder)
    if max(wanted) >= len(files):
        raise _changed(folder)
    for index in wanted:
        yield index, _cut(read(files[index], size), size)


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a frame folder in the order of the last number in their names."""
    files = [
        one for one in folder.iterdir() if one.suffix.lower() in PICTURES and not one.name.startswith(".")
    ]
    return sorted(files, key=lambda path: (_number(path) if _number(path) is not None else -1, path.name))


def _cut(picture: Image.Image, size: Size | None) -> Image.Image:
    return picture if size is None else cut(picture, size)


def _number(path: Path) -> int | None:
    found = _NUMBER.search(path.stem)
    return None if found is None else int(found[1])


# -- folders -------------------------------------------------------------------------------------------------------


def _look_folder(folder: Path, deep: bool) -> Probe:
    """Times are 0, 1, 2, ...: a folder has no clock; the caller knows the rate."""
    files = frame_files(folder)
    if not files:
        raise UserError("no pictures in the frame folder", where=str(folder), mend="put its frames there")
    numbers = [_number(one) for one in files]
    known = [number for number in numbers if number is not None]
    if len(files) > 1 and len(known) < len(files):
        raise UserError(
            "{name} has no number, so its place among the frames is not known",
            where=str(folder),
            mend="number the frames, as frame_0001.png",
            name=files[numbers.index(None)].name,
        )
    for before, after in itertools.pairwise(known):
        if after != before + 1:
            raise UserError(
                "two frames have the number {number}" if after == before else "frame {number} is missing",
                where=str(folder),
                mend="delete one of them"
                if after == before
                else "add it, or split the folder there: a jump in a clip teaches jumps",
                number=before if after == before else before + 1,
            )
    sizes = []
    for file in files:
        seen = probe(file, deep)
        if seen.problem is not None:
            raise seen.problem.error
        assert seen.size is not None, "readable"
        sizes.append(seen.size)
    for file, size in zip(files, sizes):
        if size != sizes[0]:
            raise UserError(
                "the frames have different sizes: {first} is {width} x {height}, {other} {to_width} x {to_height}",
                where=str(folder),
                mend="bring them to one size",
                first=files[0].name,
                width=sizes[0].width,
                height=sizes[0].height,
                other=file.name,
                to_width=size.width,
                to_height=size.height,
            )
    times = tuple(float(index) for index in range(len(files)))
    return Probe(sizes[0]._replace(frames=len(files)), "frames", times=times)


# -- files ---------------------------------------------------------------------------------------------------------


def _look_file(path: Path, deep: bool) -> Probe:
    if path.stat().st_size == 0:
        raise UserError(
            "the file is empty (0 bytes)", where=str(path), mend="copy or download it again, or delete it"
        )
    with _opened(path) as (container, stream):
        shown = _shown(container, stream)
        if not shown:
            raise UserError(
                "the video holds no pictures", where=str(path), mend="export it again, or delete it"
            )
        base = float(stream.time_base)
        length = (shown[-1] - shown[0]) * base
        promised = None if container.duration is None else container.duration / 1e6
        if stream.frames > len(shown) + 1 or (
            promised and not stream.frames and promised > length + MISSING_S + 2 * length / len(shown)
        ):
            raise _cut_off(path, len(shown))
    with _opened(path) as (container, stream):
        first, count = None, 0
        for frame in _frames(path, container, stream):
            first = first or frame
            count += 1
            if not deep:
                break
        if first is None or (deep and count < len(shown)):
            raise _cut_off(path, count)
        picture = _upright(first)
        traits = []
        if _turn(first):
            traits.append("rotated")
        if picture.width != first.width and not _turn(first) % 180:
            traits.append("stretched pixels")
        codec = str(stream.codec_context.name)
    times = tuple((one - shown[0]) * base for one in shown)
    return Probe(Size(*picture.size, len(shown)), codec, tuple(traits), times=times)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its video stream). Raises UserError for what is no video, and without PyAV."""
    try:
        import av
    except ImportError:
        raise UserError(
            "videos need one more package (PyAV)",
            where=str(path),
            mend='pip install "whitetuner[video]"',
            code=EXIT_ENVIRONMENT,
        ) from None
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise UserError(
                    "no pictures in this file, only sound or text", where=str(path), mend="delete it"
                )
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UserError(
                    "its codec cannot be decoded here",
                    where=str(path),
                    mend="convert it: ffmpeg -i IN -c:v libx264 -crf 16 OUT.mp4",
                )
            stream.thread_type = "AUTO"
            yield container, stream
    except FileNotFoundError as error:
        raise UserError(
            "the file is gone", where=str(path), mend="put it back, or start again without it"
        ) from error
    except av.error.FFmpegError as error:
        raise UserError(
            "the video is damaged or cut off ({reason})",
            where=str(path),
            mend="copy or download it again, or convert it (ffmpeg -i IN -c:v libx264 -crf 16 OUT.mp4)",
            reason=error.strerror or error,
        ) from error


def _shown(container: Any, stream: Any) -> list[int]:
    """Times (in the stream's clock) of the frames in the order they are shown, without decoding them."""
    times = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_corrupt and not packet.is_discard:
            time = packet.pts if packet.pts is not None else packet.dts
            if time is not None:
                times.append(time)
    return sorted(set(times))


def _frames(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames in the order they are shown, each with a time."""
    for frame in container.decode(stream):
        if frame.pts is None:
            frame.pts = frame.dts
        if frame.pts is not None:
            yield frame


def decoded(path: Path, wanted: Sequence[int], size: Size | None) -> Generator[tuple[int, Image.Image]]:
    """(number, picture) of the frames of a file one after the other, upright RGB, cut to the size (None: whole).

    wanted: rising, each once. Raises UserError when the file cannot be read or one of them cannot be decoded.
    """
    with _opened(path) as (container, stream):
        shown = _shown(container, stream)
    if wanted[-1] >= len(shown):
        raise _changed(path)
    index_of = {time: index for index, time in enumerate(shown)}
    left = list(reversed(wanted))
    lost: list[int] = []
    for seek in (True, False):  # a broken index of key frames is stepped over by reading from the start
        lost = []
        with _opened(path) as (container, stream):
            if seek:
                container.seek(shown[left[-1]], stream=stream, backward=True)
            for frame in _frames(path, container, stream):
                index = index_of.get(frame.pts)
                if index is None or not left or index < left[-1]:
                    continue
                while left and left[-1] < index:
                    lost.append(left.pop())
                if lost and seek:
                    break
                if left and left[-1] == index:
                    left.pop()
                    if not lost:
                        yield index, _cut(_upright(frame), size)
                if not left:
                    break
        left += reversed(lost)
        left.sort(reverse=True)
        if not left:
            return
    raise UserError(
        "{count} frames cannot be decoded, the first is number {first}",
        where=str(path),
        mend="the video is damaged: copy it again, convert it, or delete it (`whitetuner check DIR --deep` finds such files)",
        count=len(left),
        first=left[-1],
    )


def _upright(frame: Any) -> Image.Image:
    """RGB as players show it: square pixels, turned by the file's rotation."""
    picture: Image.Image = frame.to_image()
    ratio = getattr(frame, "sample_aspect_ratio", None)
    if ratio and ratio > 0 and ratio != 1:
        picture = picture.resize((max(1, round(picture.width * float(ratio))), picture.height))
    turn = _turn(frame)
    return picture.rotate(turn, expand=True) if turn else picture


def _turn(frame: Any) -> int:
    """Degrees counter-clockwise that the picture is turned by, 0, 90, 180 or 270."""
    return round(getattr(frame, "rotation", 0) / 90) * 90 % 360


def _cut_off(path: Path, count: int) -> UserError:
    return UserError(
        "the video is cut off: only {count} of its frames are there",
        where=str(path),
        mend="copy or download it again, or convert what is there (ffmpeg -i IN -c:v libx264 -crf 16 OUT.mp4)",
        count=count,
    )


def _changed(path: Path) -> UserError:
    return UserError(
        "the clip has fewer frames than when it was looked at",
        where=str(path),
        mend="start again when it is finished",
    )
