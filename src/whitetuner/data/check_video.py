"""What a check says of videos: of each its rate, its frames, which of them will be learned from, and why if none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whitetuner.data.problems import Problem
from whitetuner.data.scan import Films, clips_of
from whitetuner.data.survey import Found, PictureSet
from whitetuner.data.video_clips import Clip, spans
from whitetuner.data.video_folders import content_digests
from whitetuner.errors import UserError
from whitetuner.records import Size

#: Clips told one by one on a terminal; the rest is counted (the JSON has them all).
TOLD = 20


@dataclass(frozen=True)
class FilmPlan:
    """fps: of the source, by its times (a frame folder: as the config says); at_rate: its frames at the model's rate;
    clips: frames of the source that are learned from; held: times that the last frame is held to fill a short one up.
    """

    path: Path
    source: Size
    fps: float
    rate: float
    at_rate: int
    clips: tuple[Clip, ...]
    held: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "width": self.source.width,
            "height": self.source.height,
            "frames": self.source.frames,
            "fps": round(self.fps, 3),
            "rate": self.rate,
            "frames_at_rate": self.at_rate,
            "clips": [list(clip) for clip in self.clips],
            "held": self.held,
        }

    def __str__(self) -> str:
        source = f"{self.path.name}: {self.source.width}x{self.source.height}, {self.fps:.4g} fps, {self.source.frames} frames"
        if not self.clips:
            return f"{source}: left out"
        used = "; ".join(spans(clip) for clip in self.clips[:4])
        used = f"{used} and {len(self.clips) - 4} more clips" if len(self.clips) > 4 else used
        used = f"{used}, its last frame {self.held} times more" if self.held else used
        return f"{source} -> {self.at_rate} at {self.rate:g} fps; used: {used}"


def plan_film(found: Found, of: PictureSet, films: Films) -> tuple[FilmPlan | None, list[Problem]]:
    """The plan of a video that could be read, and what is to be said of it."""
    assert found.probe.size is not None and found.probe.times, "a video that could be read"
    times, options = found.probe.times, of.options
    digest = content_digests([found.path])[0] if options.clips == "random" else "0" * 16
    clips, problem = clips_of(found, of, films, digest)
    problems = [] if problem is None else [problem]
    rate = options.fps or films.fps
    if found.probe.kind == "frames":
        fps = options.frames_fps or rate
    else:
        fps = (len(times) - 1) / times[-1] if times[-1] > 0 else rate
    if clips is not None and fps < 0.9 * rate:
        slow = UserError(
            "{fps:.4g} frames a second, and the model draws {rate:g}: frames are shown twice, which teaches stutter",
            where=str(found.path),
            mend="take a video of at least that rate, or set data.fps lower",
            fps=fps,
            rate=rate,
        )
        problems.append(Problem("slow", "warning", found.path, slow))
    if clips is not None and clips.held:
        held = UserError(
            "its last frame is held {count} times to fill up a clip, which teaches standing still",
            where=str(found.path),
            mend="take a longer video, or add a smaller number to num_frames",
            count=clips.held,
        )
        problems.append(Problem("held", "note", found.path, held))
    if problem is not None and problem.level == "error":
        return None, problems
    plan = FilmPlan(
        found.path,
        found.probe.size,
        fps,
        rate,
        0 if clips is None else clips.at_rate,
        () if clips is None else clips.clips,
        0 if clips is None else clips.held,
    )
    return plan, problems
