"""The pictures that a run draws while it trains: what they need is checked before anything loads, and encoded with the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from whitetuner.config.schema import Config, Prompt
from whitetuner.data.cache import Cached, Inputs
from whitetuner.data.set_options import SetOptions
from whitetuner.errors import UserError
from whitetuner.family import Family, FamilySpec
from whitetuner.models import check_size
from whitetuner.records import Size
from whitetuner.train.preview import Scene


def check_previews(config: Config, family: Family) -> None:
    """Raises UserError for the first preview that this model cannot draw: its size, its given pictures."""
    for index, prompt in enumerate(config.preview.prompts):
        where = f"preview.prompts[{index}]"
        for text in (prompt.text, prompt.negative):
            refuse_faulty(family, text)
        if prompt.size is not None:
            check_size(Size(*prompt.size), family.stride(), f"{where}.size", "[{}, {}]")
        if config.model.task == "i2v" and not prompt.images:
            raise UserError(
                "a preview of an i2v task needs its first frame",
                where=f"{where}.images",
                mend='name it: images = ["FILE"], a picture, or a video whose first frame is taken',
            )
        if prompt.frames is not None and family.spec.frames:
            check_frames(prompt.frames, family.spec, f"{where}.frames")
        if config.model.task == "edit" and not prompt.images:
            raise UserError(
                "a preview of an edit task needs given pictures",
                where=f"{where}.images",
                mend='name them: images = ["FILE"]; one of the condition folders will do',
            )
        if config.model.task in ("t2i", "t2v") and prompt.images:
            raise UserError(
                "given pictures are for an edit task, but the task is {task}",
                where=f"{where}.images",
                mend='leave images out, or set model.task = "edit"',
                task=config.model.task,
            )
        check_given(_paths(prompt), family, f"{where}.images")
        inputs_of(prompt.text, prompt, config, family)


def refuse_faulty(family: Family, text: str) -> None:
    """Raises UserError for a text that this model cannot take."""
    fault = family.spec.caption_fault(text)
    if fault is not None:
        raise fault


def check_frames(frames: int, spec: FamilySpec, where: str) -> None:
    """Raises UserError, proposing the nearest, when this model cannot draw so many frames."""
    step = spec.frames
    if not step:
        raise UserError(
            "{title} draws pictures, and no clips", where=where, mend="leave it out", title=spec.title
        )
    if frames % step != 1 % step:
        below = max(1, (frames - 1) // step * step + 1)
        raise UserError(
            "a clip of {frames} frames is not {step} n + 1",
            where=where,
            mend="use {below} or {above}",
            frames=frames,
            step=step,
            below=below,
            above=below + step,
        )


def check_given(images: Sequence[Path], family: Family, where: str) -> None:
    """Raises UserError for a given picture that is not there, and when the model does not take so many."""
    for path in images:
        if not path.is_file():
            raise UserError(
                "there is no file {path}", where=where, mend="mend the name of the given picture", path=path
            )
    most = family.spec.references_at_most(family.options, family.paths)
    if most is not None and len(images) > most:
        raise UserError(
            "{count} given pictures, but this model takes at most {most}",
            where=where,
            mend="name fewer, or take a model for several",
            count=len(images),
            most=most,
        )


def sides_of(prompt: Prompt, config: Config, family: Family, size: Size) -> tuple[Inputs, Inputs]:
    """What the encoders are asked for a preview: its text, its negative. size: of what is learned from."""
    texts = ((prompt.text, False), (prompt.negative, True))
    wanted, unwanted = (inputs_of(text, prompt, config, family, size, negative) for text, negative in texts)
    return wanted, unwanted


def inputs_of(
    text: str,
    prompt: Prompt,
    config: Config,
    family: Family,
    size: Size | None = None,
    negative: bool = False,
) -> Inputs:
    """What the encoders are asked for a text of a preview. Raises UserError for a given picture that cannot be read.

    size: of what is learned from; None: not known yet, the model's own
    """
    images = _paths(prompt)
    drawn = drawn_size(prompt, config, family, size or family.spec.default_size)
    if family.spec.frames:
        return Inputs.from_frame(text, images[0] if images else None, drawn)
    resolution = reference_resolution(config) if images else 0
    return Inputs.prompt(text, images, resolution, family.stride(), drawn, negative)


def reference_resolution(config: Config) -> int:
    """Side in pixels of a square of the area that given pictures are read at: as those of the first data set."""
    return SetOptions.of(config.data_sets()[0]).reference_resolution


def size_beside(images: Sequence[Path], resolution: int, stride_px: int) -> Size | None:
    """What is drawn beside given pictures is of the first one's shape, as the pipelines do; None without any.

    resolution: that targets are trained at, which conditions need not be. Raises UserError as `Inputs.prompt` does.
    """
    return Inputs.prompt("", images[:1], resolution, stride_px).condition_sizes[0] if images else None


def target_resolution(config: Config) -> int:
    """The largest that the first data set's targets are trained at."""
    resolution = config.data_sets()[0].resolution
    return resolution if isinstance(resolution, int) else max(resolution)


def scene_of(prompt: Prompt, config: Config, family: Family, cached: Cached, size: Size) -> Scene:
    """A preview ready to be drawn; size: without one of its own and without given pictures."""
    wanted, unwanted = sides_of(prompt, config, family, size)
    size = drawn_size(prompt, config, family, size)
    usual_steps, usual_cfg = family.spec.sampling(family.options, family.paths)
    cfg = usual_cfg if prompt.cfg is None else prompt.cfg
    fields: Mapping[str, torch.Tensor] = cached.fields(wanted)
    return Scene(
        text=prompt.text,
        prompt=fields,
        negative=cached.fields(unwanted) if cfg > 1 else None,
        size=size,
        seed=prompt.seed,
        steps=prompt.steps or usual_steps,
        cfg=cfg,
        fps=family.spec.fps_of(family.options, family.paths) if family.spec.frames else None,
    )


def drawn_size(prompt: Prompt, config: Config, family: Family, size: Size) -> Size:
    """What a preview is drawn at: its own size, or its first given picture's shape, or `size`."""
    frames = size.frames if prompt.frames is None or not family.spec.frames else prompt.frames
    if prompt.size is not None:
        size = Size(*prompt.size)
    elif prompt.images:
        size = size_beside(_paths(prompt), target_resolution(config), family.stride()) or size
    return size._replace(frames=frames)


def _paths(prompt: Prompt) -> list[Path]:
    return [Path(image).expanduser() for image in prompt.images]
