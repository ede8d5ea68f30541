"""From what a config says of the model to its folders, checked by names and config files alone. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whitetuner.config.schema import Config
from whitetuner.data.scan import Films
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.family import WISHES, FamilySpec, ModelPaths, Options
from whitetuner.records import Size

BUILTIN = "builtin:nano"
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
            path = Path(value).expanduser()
            if not path.is_dir():
                raise UserError(
                    "{path} is not a folder in diffusers layout",
                    where=f"model.{part}",
                    mend="give the component's folder (config.json + safetensors); single files are not read yet",
                    path=path,
                )
            single[part] = path
    folder = model_folder(config.model.path) if config.model.path else None
    paths = ModelPaths(folder, single)
    check_model(spec, paths, config.model_options())
    check_task(spec, config.model_options(), paths, config.model.task)
    return paths


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


def model_folder(path: str) -> Path:
    """A model path as users write it -> the folder. Raises UserError naming what is wrong with it."""
    if path == BUILTIN:
        from whitetuner.nano.builtin import builtin_path

        return builtin_path()
    folder = Path(path.strip().strip('"')).expanduser()
    if folder.is_file():
        raise UserError(
            "{path} is a single file; only folders in diffusers layout are read so far",
            where="model.path",
            mend="download the model as a folder (model_index.json, transformer/, vae/, ...)",
            path=folder,
        )
    if not folder.is_dir():
        hub = path.count("/") == 1 and not path.startswith((".", "/", "~")) and "\\" not in path
        raise UserError(
            "{path} looks like a hub name; fetching from a hub is not there yet"
            if hub
            else "there is no folder {path}",
            where="model.path",
            mend="download the model first and give its folder"
            if hub
            else "give the folder that holds model_index.json",
            path=path,
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


def wishes_of(folder: Path) -> ModelWishes:
    """What a model folder says of itself in whitetuner.json; small models (the embedded one, those of `tiny`) have one.

    Raises UserError when the file cannot be read.
    """
    file = folder / WISHES
    if not file.is_file():
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
