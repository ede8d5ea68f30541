"""[data] and [[data.sets]]: what is learned from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from whitetuner.config.section import Section
from whitetuner.paths import PathText


def _sides(value: int | list[int]) -> int | list[int]:
    sides = value if isinstance(value, list) else [value]
    if not sides or any(not 32 <= side <= 8192 for side in sides):
        raise ValueError("every resolution lies between 32 and 8192 pixels")
    if len(set(sides)) < len(sides):
        raise ValueError("the same resolution stands there twice")
    return value


def _lengths(value: int | list[int] | None) -> int | list[int] | None:
    lengths = value if isinstance(value, list) else [] if value is None else [value]
    if value == [] or any(not 1 <= length <= 10_000 for length in lengths):
        raise ValueError("every number of frames lies between 1 and 10000")
    return value


class SetFields(Section):
    """What one data set says; [data] gives it for all sets."""

    images: PathText | None = Field(
        None, description="folder of pictures, captions in files of the same name beside them"
    )
    target: PathText | None = Field(None, description="edit: folder of the wanted results")
    conditions: list[PathText] = Field(
        default_factory=list, description="edit: folders of the given pictures, same file names"
    )
    prompt: str | None = Field(None, description="one caption for the whole set, instead of caption files")
    videos: PathText | None = Field(
        None, description="folder of videos, and of folders of numbered frames; captions beside them"
    )
    caption_ext: str = Field(".txt", pattern=r"^\.[A-Za-z0-9]+$", description="ending of the caption files")
    default_caption: str | None = Field(
        None,
        description="caption of pictures that have no caption file; unset: a missing caption is an error",
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of visits with an empty caption; 0.05 to 0.1 keeps guidance (cfg) working",
    )
    caption_shuffles: int = Field(
        0,
        ge=0,
        le=64,
        description="captions of tags between commas: so many shuffled orders are encoded beside the written one, and every "
        "visit takes one of all by lot; 0: as written",
    )
    caption_keep: int = Field(
        1,
        ge=0,
        le=1000,
        description="with caption_shuffles: tags at the beginning that stay there (a trigger)",
    )
    trigger: str | None = Field(None, description="word put before captions that do not hold it")
    resolution: Annotated[int | list[int], AfterValidator(_sides)] = Field(
        1024,
        description="side in pixels of a square of the wanted area; several: each picture is trained at the largest it fills",
    )
    condition_resolution: int | None = Field(
        None, ge=32, le=8192, description="edit: the same for the given pictures; unset: as resolution"
    )
    recursive: bool = Field(False, description="look into the folders inside, too")
    upscale: bool = Field(
        False, description="enlarge pictures that are smaller than the resolution, instead of a smaller size"
    )
    too_small: Literal["refuse", "skip"] = Field(
        "refuse", description="pictures below the model's least size: an error, or left out with a warning"
    )
    num_frames: Annotated[int | list[int] | None, AfterValidator(_lengths)] = Field(
        None,
        description="videos: frames of a clip, 4 n + 1; several: a video gives clips of the longest it fills; unset: the model's",
    )
    fps: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="videos: frames a second that clips are read at; unset: the model's own",
    )
    clips: Literal["head", "uniform", "chunks", "random"] = Field(
        "head",
        description="videos: what is learned of each: its beginning; clips_per_video clips at equal distances; all of it in "
        "clips one after the other; clips_per_video clips anywhere, another one at each visit",
    )
    clips_per_video: int = Field(
        4, ge=1, le=1000, description="videos: clips of each, for uniform and random"
    )
    too_short: Literal["skip", "pad"] = Field(
        "skip", description="videos shorter than num_frames: left out with a warning, or the last frame held"
    )
    frames_fps: float | None = Field(
        None, gt=0, le=1000, description="frame folders: frames a second they were taken at; unset: as fps"
    )

    mask_dir: PathText | None = Field(
        None, description="folder of masks, same names as the pictures: what is white counts in the loss"
    )
    mask_alpha: bool = Field(
        False, description="the pictures' own alpha channel is their mask: what is opaque counts in the loss"
    )
    mask_floor: float = Field(
        0.1, ge=0, le=1, description="with masks: how much the rest of a picture counts; 0: not at all"
    )

    @property
    def source(self) -> str | None:
        """The folder that this set is named after."""
        return self.images or self.target or self.videos


class DataSet(SetFields):
    """[[data.sets]]: one of several sets."""

    repeats: int = Field(1, ge=1, le=100_000, description="visits of each picture in one epoch")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the samples, relative to the other sets' weights; all sets have one or none does",
    )
    loss_weight: float = Field(
        1.0,
        gt=0,
        le=100,
        description="factor of the loss of this set's samples; below 1 for regularisation pictures (prior preservation)",
    )


class Data(SetFields):
    """[data]: what is learned from; the same keys may stand in each of [[data.sets]]."""

    batch_size: int = Field(1, ge=1, le=1024, description="pictures of one shape in one pass")
    cache_dir: PathText | None = Field(
        None, description="folder of the encoded pictures; unset: cache/ in output_dir"
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field(
        "auto",
        description="threads that decode pictures while others are encoded; auto: by the number of cores",
    )
    sets: list[DataSet] = Field(
        default_factory=list, description="several sets; [data] then holds what they share"
    )

    @model_validator(mode="after")
    def _sets_have_the_folders(self) -> Data:
        if self.sets and self.source is not None:
            raise ValueError(
                "the folder in [data] stands beside [[data.sets]]: move it into a [[data.sets]] of its own"
            )
        for one in (self, *self.sets):
            if sum(name is not None for name in (one.images, one.target, one.videos)) > 1:
                raise ValueError(
                    "images, target and videos are different kinds of sets: use [[data.sets]] for several"
                )
        if any(one.source is None for one in self.sets):
            raise ValueError("each of [[data.sets]] needs a folder: images, target or videos")
        weights = [one.weight is not None for one in self.sets]
        if any(weights) and not all(weights):
            raise ValueError("give weight in all of [[data.sets]] or in none")
        return self
