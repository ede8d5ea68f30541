"""What is asked of one data set: the config's words of [data] and [[data.sets]], as the workshops of the data read them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from whitetuner.data.video_clips import Choice

Small = Literal["refuse", "skip"]


@dataclass(frozen=True)
class SetOptions:
    """One data set as the config names it ([data] or one of [[data.sets]]): images, or target and conditions (edit).

    caption_dropout: share of visits at which the text is left out; default_caption: for pictures without a caption file
    (None: that is an error; "": they are learned without text); repeats: visits of every picture in an epoch;
    weight: the set's part of an epoch instead (see data/order.py); loss_weight: factor of its samples' loss;
    prompt: one caption for all, files are not looked at;
    too_small: what becomes of pictures below the model's least size; condition_resolution: side in pixels of a square of
    the area that conditions are read at, None: the largest resolution; num_frames, fps, clips, clips_per_video, too_short,
    frames_fps: of videos, see data/video_clips.py (ClipRules); mask_dir, mask_alpha, mask_floor: see data/masks.py;
    caption_shuffles, caption_keep: see data/tags.py
    """

    images: str | Path | None = None
    target: str | Path | None = None
    conditions: tuple[str | Path, ...] = ()
    prompt: str | None = None
    videos: str | Path | None = None
    caption_ext: str = ".txt"
    default_caption: str | None = None
    caption_dropout: float = 0.0
    trigger: str = ""
    resolution: int | list[int] | tuple[int, ...] = 1024
    condition_resolution: int | None = None
    recursive: bool = False
    upscale: bool = False
    repeats: int = 1
    weight: float | None = None
    loss_weight: float = 1.0
    caption_shuffles: int = 0
    caption_keep: int = 1
    mask_dir: str | Path | None = None
    mask_alpha: bool = False
    mask_floor: float = 0.1
    too_small: Small = "refuse"
    num_frames: int | list[int] | tuple[int, ...] | None = None
    fps: float | None = None
    clips: Choice = "head"
    clips_per_video: int = 4
    too_short: Literal["skip", "pad"] = "skip"
    frames_fps: float | None = None

    @classmethod
    def of(cls, section: object) -> SetOptions:
        """From any object with (some of) these attributes, as the config's data section."""
        if isinstance(section, SetOptions):
            return section
        given = {
            field.name: getattr(section, field.name) for field in fields(cls) if hasattr(section, field.name)
        }
        if isinstance(given.get("conditions"), list):
            given["conditions"] = tuple(given["conditions"])
        if given.get("trigger") is None:
            given["trigger"] = ""
        return cls(**given)

    @property
    def source(self) -> str | Path | None:
        """The folder that this set is named after."""
        return self.images or self.target or self.videos

    @property
    def reference_resolution(self) -> int:
        """Side in pixels of a square of the area that conditions are read at."""
        if self.condition_resolution is not None:
            return self.condition_resolution
        return self.resolution if isinstance(self.resolution, int) else max(self.resolution)
