"""Which frames of a video are learned from: resampled by their times, cut into clips of legal length, chosen as asked for."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from whitetuner.data.problems import Problem
from whitetuner.errors import UserError

Choice = Literal["head", "uniform", "chunks", "random"]
#: Frames of the source, counted from 0 in the order they are shown.
Clip = tuple[int, ...]


@dataclass(frozen=True)
class ClipRules:
    """How clips are made of a video.

    lengths: frames that a clip may have, rising; fps: that the model draws; source_fps: of frame folders, None: the same
    choice: head: one clip from the beginning; uniform: `count` clips at equal distances; chunks: one after the other, as many
    as there are; random: `count` clips anywhere, a visit learns from one of them in turn
    too_short: what becomes of videos shorter than the shortest length: left out, or their last frame held
    """

    lengths: tuple[int, ...]
    fps: float
    choice: Choice = "head"
    count: int = 4
    too_short: Literal["skip", "pad"] = "skip"
    source_fps: float | None = None


@dataclass(frozen=True)
class Clips:
    """clips: of equal length; at_rate: frames of the whole video at the model's rate; held: frames added to fill one up."""

    clips: tuple[Clip, ...]
    at_rate: int
    held: int = 0


def clip_lengths(num_frames: int | Sequence[int] | None, default: int, step: int) -> tuple[int, ...]:
    """The lengths asked for, rising. Raises UserError with the nearest legal one for a length that is not step n + 1."""
    asked = [default] if num_frames is None else [num_frames] if isinstance(num_frames, int) else num_frames
    for one in asked:
        if one % step != 1 % step:
            below = max(1, (one - 1) // step * step + 1)
            raise UserError(
                "{frames} frames are not {step} n + 1, as this model's clips are",
                where="data.num_frames",
                mend="use {below} or {above}",
                frames=one,
                step=step,
                below=below,
                above=below + step,
            )
    return tuple(sorted(set(asked)))


def resampled(times: Sequence[float], fps: float) -> Clip:
    """The frame nearest in time to every 1/fps seconds, from the first frame to the last. times: seconds, rising from 0."""
    count = int(times[-1] * fps + 1e-3) + 1
    found = []
    for number in range(count):
        wanted = number / fps
        after = min(bisect_left(times, wanted), len(times) - 1)
        before = max(0, after - 1)
        # the earlier one of two that are as near: frames of a clock in milliseconds fall on either side
        nearer = before if wanted - times[before] <= times[after] - wanted + 1e-6 else after
        found.append(nearer)
    return tuple(found)


def choose_clips(
    times: Sequence[float], rules: ClipRules, digest: str, *, frames: bool = False
) -> Clips | None:
    """The clips of one video; None when it is too short and is to be left out.

    times: of its frames, in seconds (frames: their numbers, of a folder); digest: of its content, the seed of `random`
    """
    if frames:
        rate = rules.source_fps or rules.fps
        times = [one / rate for one in times]
    shown = resampled(times, rules.fps)
    fitting = [length for length in rules.lengths if length <= len(shown)]
    if not fitting:
        if rules.too_short == "skip":
            return None
        length = rules.lengths[0]
        held = length - len(shown)
        return Clips(((*shown, *[shown[-1]] * held),), len(shown), held)
    length = fitting[-1]
    spare = len(shown) - length
    if rules.choice == "head":
        starts = [0]
    elif rules.choice == "chunks":
        starts = list(range(0, spare + 1, length))
    elif rules.choice == "uniform":
        count = min(rules.count, spare + 1)
        starts = sorted({round(index * spare / max(1, count - 1)) for index in range(count)})
    else:
        source = random.Random(int(digest[:16], 16))
        starts = [int(source.random() * (spare + 1)) for _ in range(rules.count)]
        starts = list(dict.fromkeys(starts))
    return Clips(tuple(shown[start : start + length] for start in starts), len(shown))


def too_short(path: Path, have: int, rules: ClipRules) -> Problem:
    """What to say of a video that is left out."""
    error = UserError(
        "too short: {have} frames at {fps:g} a second, {need} are needed; it is left out",
        where=str(path),
        mend='set too_short = "pad" to hold its last frame, or add a smaller number to num_frames',
        have=have,
        fps=rules.fps,
        need=rules.lengths[0],
    )
    return Problem("too short", "warning", path, error)


def spans(clip: Clip) -> str:
    """Frames in few words: "0-32", "0, 2, 3, 5, ... 60 (33 of them)"."""
    if clip == tuple(range(clip[0], clip[0] + len(clip))):
        return f"{clip[0]}-{clip[-1]}" if len(clip) > 1 else str(clip[0])
    return ", ".join(map(str, clip[:4])) + f", ... {clip[-1]} ({len(clip)} of them)"
