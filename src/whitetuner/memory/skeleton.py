"""A module without its weights: the architecture of a folder's config.json, in no memory and no time.

Parameters are on the meta device; computed buffers (rotary tables, masks) are real.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from whitetuner.errors import UserError
from whitetuner.family import Recast
from whitetuner.memory.quantize import Kind, quantize_linears


def empty_module(cls: Any, folder: Path, overrides: Mapping[str, Any] | None = None) -> Any:
    """The module with parameters on the meta device and real buffers; only config.json is read.

    A class's `recast` (whitetuner.family) is followed.
    Raises UserError when config.json is missing, unreadable, or of another class.
    """
    settings, recast = _read_config(folder), recast_of(cls)
    overrides = {**recast.config, **(overrides or {})}
    if "quantization_config" in settings:
        raise UserError(
            "these weights are already quantised by another program ({method})",
            where=str(folder / "config.json"),
            mend="use the bf16 version of the model; it is quantised while it loads (memory.base)",
            method=settings["quantization_config"].get("quant_method", "unknown"),
        )
    try:
        with init_empty_weights(include_buffers=False):
            module = _built(cls, folder, settings, overrides)
    except _SENSELESS as error:
        raise UserError(
            "the model cannot be built from its config.json ({reason})",
            where=str(folder / "config.json"),
            mend="download this file again; the model it belongs to may be newer than this program",
            reason=(str(error).splitlines() or [type(error).__name__])[0][:160],
        ) from error
    if hasattr(module, "tie_weights"):  # once more: moving parameters to meta has cut the ties made inside
        module.tie_weights()
    return module


#: What the libraries raise over numbers and words in a config.json that make no model. (RuntimeError: torch, over sizes; no
#: weights are made here, so even memory that does not suffice is a size that makes no sense.)
_SENSELESS = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)


def _built(cls: Any, folder: Path, settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    if hasattr(cls, "from_config") and hasattr(cls, "load_config"):
        named = settings.get("_class_name", cls.__name__)
        if named not in (cls.__name__, *recast_of(cls).reads):
            raise UserError(
                "the folder holds a {named}, but a {wanted} is needed here",
                where=str(folder / "config.json"),
                mend="point this part of the model at the folder that belongs to it",
                named=named,
                wanted=cls.__name__,
            )
        return cls.from_config({**settings, "_class_name": cls.__name__, **overrides})
    config = cls.config_class.from_pretrained(str(folder), local_files_only=True, **overrides)
    module = cls(config)
    if (folder / "generation_config.json").is_file() and module.can_generate():
        kind = type(module.generation_config)
        module.generation_config = kind.from_pretrained(str(folder), local_files_only=True)
    return module


def recast_of(cls: type) -> Recast:
    """What the class says of folders that are not quite its own; nothing changes for the others."""
    return getattr(cls, "recast", None) or Recast()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        raise UserError(
            "there is no config.json in the model folder",
            where=str(folder),
            mend="check the path; a component folder (transformer, vae) holds config.json and *.safetensors",
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            "config.json cannot be read ({error})",
            where=str(path),
            mend="download this file again",
            error=error,
        ) from error
    if not isinstance(settings, dict):
        raise UserError("config.json holds no settings", where=str(path), mend="download this file again")
    return settings


def float32_names(module: nn.Module, dtype: torch.dtype) -> frozenset[str]:
    """Names that the class keeps in float32 when `dtype` is smaller, by its library's own rule."""
    if dtype not in (torch.float16, torch.bfloat16):
        return frozenset()
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if hasattr(module, "base_model_prefix"):  # transformers: the plain list guards float16 only
        kept = kept if dtype == torch.float16 else set()
        kept |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    return frozenset(n for n in module.state_dict() if kept.intersection(n.split(".")))


def sketch_module(
    cls: type,
    folder: Path,
    *,
    keep_precise: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    quantize: Kind | None = None,
) -> Any:
    """A BuildFn whose module has no weights but every shape and dtype that `build_module` would give: for
    the plan.

    Only config.json is read. Raises UserError as `empty_module`.
    """
    module = empty_module(cls, folder)
    precise = float32_names(module, dtype)
    module.requires_grad_(False)
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for attribute, parameter in child._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                wanted = torch.float32 if prefix + attribute in precise else dtype
                shape = torch.empty(parameter.shape, dtype=wanted, device="meta")
                child._parameters[attribute] = nn.Parameter(shape, requires_grad=False)
    if quantize is not None:
        names = [name for name, _ in module.named_parameters()]
        kept = {n for n in names if n in precise or any(fnmatchcase(n, p) for p in keep_precise)}
        quantize_linears(module, quantize, frozenset(kept))
    return module.eval()
