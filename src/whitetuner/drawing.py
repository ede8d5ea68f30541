"""`sample`: a picture from a model folder, a model and an adapter file, or a run; beside given pictures in an edit task."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from whitetuner.adapters.attach import attach_state
from whitetuner.adapters.files import load_adapter
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.between import decoding_in_room
from whitetuner.config.load import load_config
from whitetuner.data.inputs import Inputs
from whitetuner.encoding import card_bytes, encoding_on
from whitetuner.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError, require_text
from whitetuner.families import registry
from whitetuner.family import BuildFn, Family, FamilySpec, ModelPaths
from whitetuner.learned import adapter_files, learned_files, no_run
from whitetuner.memory.build import Build, rehearse_module
from whitetuner.memory.phases import PhaseBuild, device_budget
from whitetuner.models import check_model, check_size, family_of, folder_paths, model_paths, wishes_of
from whitetuner.records import EncodeInput, Size
from whitetuner.rehearsal import check_weights
from whitetuner.resolve import choose_device, choose_dtype
from whitetuner.runs.film import can_write, contact_sheet, write_film
from whitetuner.runs.folder import RunFolder
from whitetuner.scenes import (
    check_frames,
    check_given,
    reference_resolution,
    refuse_faulty,
    size_beside,
    target_resolution,
)
from whitetuner.tongue import say

#: Longest side that is drawn; larger ones are a slip of the finger that would ask for terabytes.
LARGEST_PX = 8192
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILM_ENDINGS = (".mp4",)


def sample(
    model: str,
    *,
    adapter: Path | None = None,
    checkpoint: int | str | None = None,
    strength: float = 1.0,
    prompt: str = "",
    negative: str = "",
    images: Sequence[Path] = (),
    out: Path,
    family_name: str | None = None,
    size: Size | None = None,
    frames: int | None = None,
    steps: int | None = None,
    cfg: float | None = None,
    seed: int = 0,
) -> Path:
    """Draws one picture, or with a video model a clip of so many frames, and writes it.

    model: run folder, model folder or builtin:nano; strength: factor of the adapter
    checkpoint: of a run, instead of its final files: "best", "latest" or a step
    images: given pictures (edit), read as the run's own were; the first one's size is drawn at where none is named.
    In an i2v task the one image is the first frame: a picture, or a video whose first frame is taken.
    A clip goes into an .mp4 (PyAV is needed), or as a contact sheet into a picture file.
    """
    check_numbers(steps, cfg, seed, strength)
    check_place(out)
    for where, text in (("--prompt", prompt), ("--negative", negative)):
        require_text(text, where)
    with TemporaryDirectory() as beside:
        subject = subject_of(model, adapter, family_name, checkpoint, Path(beside))
        family, spec = subject.family, subject.family.spec
        given = {part: load_adapter(file, family.keys) for part, file in subject.adapters.items()}
    variant = spec.variant_of(family.options, family.paths)
    task = task_for(spec, variant, bool(images), subject.trained)
    for text in (prompt, negative):
        refuse_faulty(family, text)
    check_given(images, family, "--image")
    check_weights(family)
    check_fits(family, given, subject.adapters)
    size = size_to_draw(subject, size, frames, images)
    asked = asked_of(subject, (prompt, negative), images, size)
    check_kind(out, bool(spec.frames))
    usual_steps, usual_cfg = spec.sampling(family.options, family.paths)
    guidance = usual_cfg if cfg is None else cfg
    drawn = _drawn(
        family,
        given,
        strength,
        asked if guidance > 1 else asked[:1],
        task,
        encoder_base=subject.encoder_base,
        size=size,
        steps=steps or usual_steps,
        cfg=guidance,
        seed=seed,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() in FILM_ENDINGS:
        return write_film(drawn, out, spec.fps_of(family.options, family.paths))
    (contact_sheet(drawn) if len(drawn) > 1 else drawn[0]).save(out)
    return out


@dataclass(frozen=True)
class Subject:
    """What is drawn with.

    adapters:    part of the model -> the file that goes onto it
    usual:       the size that is drawn where none is named, its frames those that a run learned
    target_px, reference_px: sides of squares of the areas that targets are drawn and given pictures are read at
    trained:     the run's task; None: no run
    encoder_base: memory.encoder_base of the run
    """

    family: Family
    adapters: Mapping[str, Path]
    usual: Size
    target_px: int
    reference_px: int
    trained: str | None = None
    encoder_base: str = "auto"


def subject_of(
    model: str,
    adapter: Path | None,
    family_name: str | None,
    checkpoint: int | str | None = None,
    beside: Path = Path(),
) -> Subject:
    """From a run folder or a model folder, and an adapter file. Raises UserError for what is not there or does not fit.

    checkpoint, beside: see `learned_files`
    """
    run = RunFolder(Path(model))
    if run.is_run():
        return _of_run(run, adapter, checkpoint, beside)
    if checkpoint is not None:
        raise no_run(model)
    paths = folder_paths(model)
    assert paths.folder is not None
    spec = registry.spec(family_name or family_of(paths.folder))
    wants = wishes_of(paths.folder)
    family = registry.load(spec.name, spec.options(**wants.options), paths)
    check_model(spec, family.paths, family.options)
    usual = wants.size or spec.default_size
    side = math.isqrt(usual.width * usual.height)
    return Subject(family, adapter_files(adapter, family), usual, side, side)


def _of_run(run: RunFolder, adapter: Path | None, checkpoint: int | str | None, beside: Path) -> Subject:
    """The run's model, all of it, with the files of what it learned (or with the file that is given)."""
    config = load_config(run.config_file).config
    spec, given = registry.spec(config.model.family), model_paths(config)
    options, whole = config.model_options(), spec.whole(config.model_options())
    family = registry.load(spec.name, whole, given)
    check_model(spec, family.paths, family.options)
    kind, learned = config.method.kind, spec.parts(registry.load(spec.name, options, family.paths).options)
    files = {} if adapter is None else adapter_files(adapter, family)
    if adapter is None:
        own = learned_files(run, learned, kind, checkpoint, beside)
        if kind == "full":
            family = registry.load(spec.name, whole, ModelPaths(given.folder, {**given.single, **own}))
        else:
            files = own
    usual, frames = wishes_of(given.folder).size or spec.default_size, config.data.num_frames
    if frames is not None and spec.frames:
        usual = usual._replace(frames=max(frames) if isinstance(frames, list) else frames)
    sides, base = (target_resolution(config), reference_resolution(config)), config.memory.encoder_base
    return Subject(family, files, usual, *sides, trained=config.model.task, encoder_base=base)


def size_to_draw(subject: Subject, size: Size | None, frames: int | None, images: Sequence[Path]) -> Size:
    """The size asked for, or that of the first given picture, or the usual one. Raises UserError when it cannot be drawn."""
    spec, stride_px = subject.family.spec, subject.family.stride()
    size = size or size_beside(images, subject.target_px, stride_px) or subject.usual
    if not all(0 < side <= LARGEST_PX for side in (size.width, size.height)):
        raise UserError(
            "{width}x{height} is no size to draw",
            where="--size",
            mend="give sides from 16 to {largest} pixels",
            width=size.width,
            height=size.height,
            largest=LARGEST_PX,
        )
    check_size(size, stride_px, "--size")
    if spec.frames or frames is not None:
        size = size._replace(frames=frames or subject.usual.frames)
        check_frames(size.frames, spec, "--frames")
    return size


def asked_of(
    subject: Subject, texts: tuple[str, str], images: Sequence[Path], size: Size
) -> tuple[Inputs, ...]:
    """What the encoders are asked. texts: the prompt, what guidance leads away from. Raises UserError for unreadable pictures."""
    if subject.family.spec.frames:
        return tuple(Inputs.from_frame(text, images[0] if images else None, size) for text in texts)
    stride_px = subject.family.stride()
    return tuple(
        Inputs.prompt(text, images, subject.reference_px, stride_px, size, unconditional)
        for text, unconditional in zip(texts, (False, True))
    )


def _drawn(
    family: Family,
    given: Mapping[str, tuple[AdapterSettings, dict[str, torch.Tensor]]],
    strength: float,
    asked: Sequence[Inputs],
    task: str,
    encoder_base: str,
    **how: Any,
) -> list[Image.Image]:
    """Encodes, loads, patches and draws. asked: of the prompt, and with guidance of the negative;  how: see Family.generate."""
    device = choose_device("auto")
    build = PhaseBuild(Build(choose_dtype("auto", device), device), device_budget(device, None), tell=say)
    card = card_bytes(device, None)
    encoding = encoding_on(encoder_base, family, task, build.build.dtype, card, size=how["size"])
    for line in encoding.words():
        say(line)
    scenes = encode_prompts(family, encoding.build(build), asked, task)
    build.release()
    lists = family.spec.parts(family.options)[0].block_lists  # the parts of a family are of one architecture
    denoisers = PhaseBuild(build.build, build.budget_bytes, block_lists=lists, together=True, tell=say)
    modules = family.load(denoisers)
    for part, state in given.items():
        attached = attach_state(modules[part], *state)
        attached.strength = strength
    decoder = family.load_decoder(build)
    room = [engine.evict for engine in denoisers.engines]
    with torch.no_grad(), decoding_in_room(decoder, room):
        drawn = family.generate(modules, decoder, scenes[0], scenes[1] if len(scenes) > 1 else None, **how)
    if drawn[0].convert("RGB").getbbox() is None:  # black all over, as NaN becomes
        check_finite({**modules, "vae": decoder}, scenes[0])
    return drawn


def check_kind(out: Path, film: bool) -> None:
    """Raises UserError when a picture was asked for as a film, or a film without the package that writes it."""
    if out.suffix.lower() not in FILM_ENDINGS:
        return
    if not film:
        raise UserError(
            "{name} does not end like a picture",
            where="--out",
            mend="end it in one of {endings}",
            name=out.name,
            endings=", ".join(PICTURE_ENDINGS),
        )
    if not can_write():
        raise UserError(
            "writing .mp4 needs one more package (PyAV)",
            where="--out",
            mend='pip install "whitetuner[video]", or end it in .png for a contact sheet',
            code=EXIT_ENVIRONMENT,
        )


def check_numbers(steps: int | None, cfg: float | None, seed: int, strength: float) -> None:
    """Raises UserError for the first that cannot be drawn with."""
    wrong = [
        ("--steps", steps, "give 1 or more", steps is None or steps >= 1),
        ("--cfg", cfg, "give a number from 0 on", cfg is None or 0 <= cfg < float("inf")),
        ("--seed", seed, "give a whole number from 0 to 2^63 - 1", 0 <= seed < 2**63),
        ("--strength", strength, "give a number, e.g. 1.0", abs(strength) < float("inf")),
    ]
    for where, value, mend, right in wrong:
        if not right:
            raise UserError("{value} does not do here", where=where, mend="{range}", value=value, range=mend)


def check_place(out: Path) -> None:
    """Raises UserError when no picture can be written there: told before the model is loaded, not after."""
    if out.suffix.lower() not in PICTURE_ENDINGS + FILM_ENDINGS:
        raise UserError(
            "{name} does not end like a picture",
            where="--out",
            mend="end it in one of {endings} (a clip: {films})",
            name=out.name,
            endings=", ".join(PICTURE_ENDINGS),
            films=", ".join(FILM_ENDINGS),
        )
    if out.is_dir():
        raise UserError("{path} is a folder", where="--out", mend="give the name of a file", path=out)
    above = next(one for one in out.absolute().parents if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(
            "no file can be written into {folder}",
            where="--out",
            mend="name a folder of yours",
            code=EXIT_ENVIRONMENT,
            folder=above,
        )


def check_fits(
    family: Family,
    given: Mapping[str, tuple[AdapterSettings, dict[str, torch.Tensor]]],
    files: Mapping[str, Path],
) -> None:
    """Raises UserError for an adapter of another model or size, naming its file: tried on the model's skeleton."""
    skeletons = family.load(rehearse_module) if given else {}
    for part, state in given.items():
        attach_state(skeletons[part], *state, where=str(files[part]))


def check_finite(modules: Mapping[str, torch.nn.Module], prompt: Mapping[str, torch.Tensor]) -> None:
    """Why a picture came out black. Raises UserError naming the part that holds or made NaN; a picture may be black."""
    bad = [name for name, tensor in prompt.items() if not torch.isfinite(tensor).all()]
    for part, module in modules.items():
        bad += [
            f"{part} {name}"
            for name, tensor in module.state_dict().items()
            if not torch.isfinite(tensor).all()
        ]
    if bad:
        raise UserError(
            "the picture is not one: there are values that are not finite in {name}",
            where="sample",
            mend="download this part of the model again (or use another adapter)",
            code=EXIT_FAILED,
            name=bad[0],
        )


def task_for(spec: FamilySpec, variant: str | None, given: bool, trained: str | None) -> str:
    """The task that a picture is drawn in. variant: of the model, None: any; given: pictures are; trained: the run's task.

    Raises UserError when the model needs given pictures and has none, or cannot take them.
    """
    beside_pictures = ("edit", "i2v")
    tasks = spec.tasks if variant is None else spec.tasks_of(variant)
    able = [task for task in tasks if (task in beside_pictures) == given]
    if trained in beside_pictures and not given:
        able = []
    if able:
        return trained if trained in able else able[0]
    if given:
        raise UserError(
            "{title} takes no given pictures",
            where="--image",
            mend="leave --image out, or give a model for an edit task",
            title=spec.title if variant is None else f"{spec.title} {variant}",
        )
    raise UserError(
        "this is for an edit task: it draws beside given pictures, and there are none",
        where="--image",
        mend="add --image FILE (once for each picture)",
    )


def encode_prompts(
    family: Family, build: BuildFn, asked: Sequence[Inputs], task: str = "t2i"
) -> list[dict[str, torch.Tensor]]:
    """For each prompt the fields of every encoder that looks at no target: at the caption, the given pictures or both."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in asked]
    given = []
    for inputs in asked:
        conditions, originals = inputs.pictures()
        given.append(
            EncodeInput(
                inputs.caption,
                conditions=conditions,
                originals=originals,
                size=inputs.size,
                unconditional=inputs.unconditional,
            )
        )
    for encoder in family.encoders(task):
        if "target" not in encoder.reads and ("caption" in encoder.reads or asked[0].conditions):
            encoder.load(build)
            for fields, one in zip(found, given):
                fields.update(encoder.encode(one))
            encoder.free()
    return found
