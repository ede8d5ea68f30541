"""From what a config says of the model to its folders, checked by names and config files alone. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whitetuner.config.schema import Config
from whitetuner.data.scan import Films
from whitetuner.errors import UserError, UserErrors
from whitetuner.families import registry
from whitetuner.family import WISHES, FamilySpec, ModelPaths, Options
from whitetuner.hub_names import hub_name
from whitetuner.nano.builtin import MODELS, builtin_path, shared_parts
from whitetuner.records import Size
from whitetuner.single_files import carried_tokenizer, component_of, fetched, settings_of, whence

SINGLE_PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder", "tokenizer")


def model_paths(config: Config) -> ModelPaths:
    """Where the config's model lies, after a look that it is all there and of the right family. Raises UserError."""
    spec = registry.spec(config.model.family)
    if config.model.task not in spec.tasks:
        raise UserError(
            "{title} has no task '{task}' here",
            where="model.task",
            mend="use one of: {tasks}",
            title=spec.title,
            task=config.model.task,
            tasks=", ".join(spec.tasks),
        )
    single = {}
    for part in SINGLE_PARTS:
        value = getattr(config.model, part, None)
        if value is not None:
            single[part] = part_path(spec, part, str(value))
    given = config.model.path
    if given and as_path(given).is_file():
        single.setdefault("transformer", component_of(spec, "transformer", as_path(given)))
        given = None
    paths = folder_paths(given, single) if given else ModelPaths(None, single)
    if paths.folder is None:
        paths = completed(spec, config.model_options(), paths)
    check_model(spec, paths, config.model_options())
    check_task(spec, config.model_options(), paths, config.model.task)
    return paths


def part_path(spec: FamilySpec, part: str, value: str) -> Path:
    """A part as the config names it -> its component folder; a single file is told by its tensors.

    Raises UserError when there is nothing, or something else.
    """
    path = as_path(value)
    if path.is_dir():
        return path
    if not path.exists():
        raise UserError(
            "there is nothing at {path}",
            where=f"model.{part}",
            mend="give {whence}",
            path=path,
            whence=whence(spec, part),
        )
    return component_of(spec, part, path)


def completed(spec: FamilySpec, options: Options, paths: ModelPaths) -> ModelPaths:
    """Single parts with what no file of weights holds. Raises UserErrors naming every part that is missing, and its source."""
    single = dict(paths.single)
    missing = []
    if "transformer" in single:
        for part in spec.components_of(options, paths):
            found = single.get(part) or settings_of(spec, part)
            if found is None and part == "tokenizer" and "text_encoder" in single:
                found = carried_tokenizer(spec, single["text_encoder"])
            if found is None:
                missing.append(part)
            else:
                single[part] = found
    else:
        missing = ["transformer"]
    if missing:
        errors = [
            UserError(
                "the part '{part}' of {title} is not given",
                where=f"model.{part}",
                mend="give {whence}",
                part=part,
                title=spec.title,
                whence=whence(spec, part),
            )
            for part in missing
        ]
        raise UserErrors(errors) if len(errors) > 1 else errors[0]
    return ModelPaths(None, single)


def as_path(value: str) -> Path:
    """As users write paths: in quotes, with blanks around, with ~."""
    return Path(value.strip().strip('"')).expanduser()


def films_of(config: Config, spec: FamilySpec, options: Options, paths: ModelPaths | None) -> Films:
    """What this model wants of videos. paths: None where the model is not looked at: the family's usual rate."""
    return Films(
        spec.frames,
        spec.fps_of(options, ModelPaths(None) if paths is None else paths) if spec.frames else 16.0,
        spec.default_size.frames,
        config.model.task == "i2v",
    )


def check_task(spec: FamilySpec, options: Options, paths: ModelPaths, task: str) -> None:
    """Raises UserError when the variant that lies in the folder is not for this task."""
    variant = spec.variant_of(options, paths)
    if variant is not None and task not in spec.tasks_of(variant):
        raise UserError(
            "the folder holds {title} {variant}, which is for {tasks}, not for {task}",
            where="model.task",
            mend="give a model folder that is for {task}, or set model.task to what this one is for",
            title=spec.title,
            variant=variant,
            tasks=", ".join(spec.tasks_of(variant)),
            task=task,
        )


def folder_paths(path: str, single: Mapping[str, Path] | None = None) -> ModelPaths:
    """A model path as users write it, single parts beside it. An embedded model takes what it shares from the first one.

    Raises UserError as `model_folder` does.
    """
    shared = shared_parts(path) if path in MODELS else {}
    return ModelPaths(model_folder(path), {**shared, **(single or {})})


def model_folder(path: str) -> Path:
    """A model path as users write it -> the folder. Raises UserError naming what is wrong with it."""
    if path in MODELS:
        return builtin_path(path)
    if path.startswith("builtin:"):
        raise UserError(
            "there is no embedded model {path}",
            where="model.path",
            mend="use one of: {known}",
            path=path,
            known=", ".join(MODELS),
        )
    folder = as_path(path)
    if folder.is_file():
        raise UserError(
            "{path} is a single file; here a folder in diffusers layout is wanted",
            where="model.path",
            mend="give the folder (model_index.json, transformer/, vae/, ...); single files go into a config",
            path=folder,
        )
    if not folder.is_dir():
        name = hub_name(path)
        here = None if name is None else fetched(name)
        if here is not None:
            return here.folder
        raise UserError(
            "there is no folder {path}"
            if name is None
            else "{path} looks like a hub name, and was not fetched yet",
            where="model.path",
            mend="give the folder that holds model_index.json"
            if name is None
            else "`whitetuner fetch {path}` fetches what is needed (so does training); or give a folder",
            path=path if name is None else name,
        )
    if not (folder / "model_index.json").is_file():
        raise UserError(
            "{path} is no model folder: model_index.json is missing",
            where="model.path",
            mend="give the folder that holds model_index.json, or set the parts one by one (model.transformer, model.vae, ...)",
            path=folder,
        )
    return folder


def check_model(spec: FamilySpec, paths: ModelPaths, options: Options | None = None) -> None:
    """Every component is there and the denoiser is of this family. Reads names and config.json only."""
    check_class(spec, paths)
    for name in spec.components_of(spec.options() if options is None else options, paths):
        folder = paths.component(name)
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            read_settings(file)


def check_class(spec: FamilySpec, paths: ModelPaths) -> None:
    """Raises UserError when the denoiser is of another family."""
    if spec.transformer_class:
        found = class_name(paths.component("transformer"))
        if found not in (spec.transformer_class, *spec.converts):
            raise UserError(
                "this is a {found}, but {title} is a {wanted}",
                where=str(paths.component("transformer")),
                mend="set model.family to the model's family, or give another model folder",
                found=found,
                title=spec.title,
                wanted=spec.transformer_class,
            )


def check_size(size: Size, stride_px: int, where: str, written: str = "{}x{}") -> None:
    """Raises UserError, proposing the nearest, when this model cannot draw pictures of this size.

    written: how a size is typed at that place, as a format of width and height
    """
    if size.width % stride_px or size.height % stride_px:
        near = [max(1, round(side / stride_px)) * stride_px for side in (size.width, size.height)]
        raise UserError(
            "a picture of {width}x{height} is not a multiple of {stride} pixels",
            where=where,
            mend="the nearest that is: {near}",
            width=size.width,
            height=size.height,
            stride=stride_px,
            near=written.format(*near),
        )


def class_name(component: Path) -> str:
    """`_class_name` of a diffusers component folder. Raises UserError when config.json cannot be read."""
    file = component / "config.json"
    document = read_settings(file)
    return str(document.get("_class_name", "model without _class_name"))


def read_settings(file: Path) -> Mapping[str, Any]:
    """A settings file of a model folder. Raises UserError when it is not there or holds no settings."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        raise UserError(
            "{name} cannot be read ({reason})",
            where=str(file.parent),
            mend="download this part of the model again",
            name=file.name,
            reason=error.strerror if isinstance(error, OSError) else error,
        ) from error
    return document


def is_random(paths: ModelPaths) -> bool:
    """True for a model made by `whitetuner tiny`: what it draws is noise, and every output says so."""
    return paths.folder is not None and (paths.folder / registry.RANDOM_MARK).is_file()


@dataclass(frozen=True)
class ModelWishes:
    """How a model wants to be asked where nobody says otherwise: its own options and the size it draws at."""

    options: Mapping[str, Any] = field(default_factory=dict)
    size: Size | None = None


def wishes_of(folder: Path | None) -> ModelWishes:
    """What a model folder says of itself in whitetuner.json; small models (the embedded one, those of `tiny`) have one.

    Raises UserError when the file cannot be read.
    """
    file = None if folder is None else folder / WISHES
    if file is None or not file.is_file():
        return ModelWishes()
    document = read_settings(file)
    size = document.get("size")
    return ModelWishes(dict(document.get("options", {})), Size(*size) if size else None)


def family_of(folder: Path) -> str:
    """Which registered family a model folder belongs to, told from its denoiser's class."""
    found = class_name(ModelPaths(folder).component("transformer"))
    for name in registry.FAMILIES:
        if registry.spec(name).transformer_class == found:
            return name
    raise UserError(
        "no known family uses a {found}",
        where=str(folder),
        mend="known families: {known}",
        found=found,
        known=", ".join(registry.FAMILIES),
    )
