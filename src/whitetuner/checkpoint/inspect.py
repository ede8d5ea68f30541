"""What is this file: family, kind, shape, names, settings, and which programs will load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from whitetuner.adapters.files import read_header, read_safetensors, sort_tensors
from whitetuner.adapters.names import FOREIGN, parse, resolve, style_of, targets
from whitetuner.adapters.shapes import reading_limits
from whitetuner.adapters.state import ModuleState, describe, infer_settings, rank_of
from whitetuner.checkpoint.original import LEADS, known_layout
from whitetuner.errors import UserError
from whitetuner.family import KeyMap
from whitetuner.memory.weights import is_fp8_extra

#: Whose naming -> programs that read it, if their model has these names.
READERS: Mapping[str, tuple[str, ...]] = {
    "LyCORIS": ("ComfyUI", "LyCORIS"),
    "kohya": ("ComfyUI",),
    "ComfyUI": ("ComfyUI",),
    "diffusers": ("diffusers", "PEFT"),
    "PEFT": ("PEFT", "diffusers"),
    "module paths": ("White Tuner",),
}


def inspect_file(path: Path, keymaps: Mapping[str, KeyMap]) -> dict[str, Any]:
    """What a safetensors file is, as plain values for a screen or for JSON.

    keymaps: family name -> key map, of every family the file may belong to
    Always there: file, bytes, what ("adapter", "model" or "unknown"), tensors, parameters, dtypes, metadata. `family` is
    None where no family, or more than one, knows all the names.
    Raises UserError for a file that cannot be read (missing, pickled, torn).
    """
    tensors, metadata = read_header(path)
    found: dict[str, Any] = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "what": "unknown",
        "family": None,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
    }
    if any(parse(name) is not None or name.endswith(tuple(FOREIGN)) for name in tensors):
        found |= _adapter(path, read_safetensors(path)[0], keymaps)
    elif tensors:
        found |= _model(tensors, keymaps)
    told = _settings_told(metadata)
    return {**found, **({"training": told} if told else {}), "metadata": metadata}


def _adapter(path: Path, tensors: Mapping[str, Tensor], keymaps: Mapping[str, KeyMap]) -> dict[str, Any]:
    try:
        by_prefix = sort_tensors(path, tensors)
    except UserError as error:
        return {"what": "adapter", "cannot_be_read": error.what}
    styles = sorted({style_of(prefix) for prefix in by_prefix})
    settings = infer_settings(by_prefix)
    scales = sorted({module.scale for module in by_prefix.values()})
    found: dict[str, Any] = {
        "what": "adapter",
        "kind": settings.kind,
        "naming": ", ".join(styles),
        "modules": len(by_prefix),
        "settings": describe(settings),
        **{key: value for key, value in asdict(settings).items() if key != "kind"},
        "ranks": sorted({rank_of(module.tensors) for module in by_prefix.values() if _low_rank(module)}),
        "scale": scales[0] if len(scales) == 1 else scales,
        "layer_sizes": dict(
            Counter("{}x{}".format(*module.size) for module in by_prefix.values()).most_common(8)
        ),
        "example": next(iter(by_prefix)),
    }
    sizes = {prefix: module.size for prefix, module in by_prefix.items()}
    families = []
    for name, keymap in keymaps.items():
        if all(targets(prefix, out, keymap) for prefix, (out, _) in sizes.items()):
            families.append((name, resolve(path, sizes, keymap)))
    found["family"] = families[0][0] if len(families) == 1 else None
    if len(families) > 1:
        found["families"] = [name for name, _ in families]
    readers = [reader for style in styles for reader in READERS[style]]
    if reading_limits(sizes, settings):
        readers = [reader for reader in readers if reader not in ("diffusers", "PEFT")]
    found["read_by"] = list(dict.fromkeys(["White Tuner", *readers])) if families else readers
    return found


def _low_rank(module: ModuleState) -> bool:
    return not {"lokr_w1", "lokr_w2"} <= set(module.tensors)


def _model(tensors: Mapping[str, Tensor], keymaps: Mapping[str, KeyMap]) -> dict[str, Any]:
    """A whole denoiser of a family, or another part of a model; the tensors are shapes only (device "meta")."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not is_fp8_extra(name)}
    scaled = {"scales": "fp8 with scales"} if len(shapes) < len(tensors) else {}
    for family, keymap in keymaps.items():
        try:
            found = known_layout(shapes, keymap)
        except UserError as error:
            return {"what": "model", "family": family, "cannot_be_read": error.what, **scaled}
        if found is not None:
            layout = found[0]
            readers = ["White Tuner", "diffusers"] if layout == "diffusers" else ["White Tuner"]
            if layout == "original" and getattr(keymap, "in_comfyui", True):
                readers += ["ComfyUI", "diffusers (from_single_file)"]
            prefix = next((lead for lead in LEADS if lead and next(iter(shapes)).startswith(lead)), "")
            tensors_known = f"{len(shapes)} of {len(shapes)}"
            return {
                "what": "model",
                "family": family,
                "naming": layout,
                "prefix": prefix,
                "names_known": tensors_known,
                "read_by": readers,
                **scaled,
            }
    return {}


def _settings_told(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the file says of its training: ours, and kohya's keys, which most programs write."""
    told = {
        name: metadata[key]
        for name, key in (
            ("trained_by", "whitetuner_version"),
            ("steps", "ss_steps"),
            ("base_model", "ss_base_model_version"),
            ("base_model", "modelspec.architecture"),
            ("learning_rate", "ss_learning_rate"),
            ("optimizer", "ss_optimizer"),
            ("resolution", "ss_resolution"),
            ("network_args", "ss_network_args"),
            ("trigger", "modelspec.trigger_phrase"),
        )
        if metadata.get(key)
    }
    if "trained_by" in told:
        told["trained_by"] = f"White Tuner {told['trained_by']}"
    return told
