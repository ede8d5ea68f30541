"""The adapter file to take away, in the names of the program that will read it.

Programs disagree on alpha: LyCORIS applies alpha / rank twice when it merges, diffusers ignores the tensor, PEFT wants a
config beside the file. They all agree where it makes no difference, so the scale is folded into one factor in float32, and
alpha, where a program insists on it, says 1 (it equals the rank; for a LoKr of two full factors any number will do).

    naming      module names                                  tensors
    comfyui     the family's, for ComfyUI                      lokr_* or lora_down, lora_up, and alpha
    lycoris     lycoris_<diffusers path with _ for .>          the same; for lycoris-lora's create_lycoris_from_weights
    diffusers   transformer.<diffusers path>                   lokr_* or lora_A, lora_B, no alpha; for load_lora_adapter
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from whitetuner.adapters.files import load_adapter, read_safetensors
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.adapters.state import SCALE_CARRIERS, by_module, file_suffix, rank_of
from whitetuner.checkpoint.tensorfile import write_tensors
from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.family import KeyMap, Naming
from whitetuner.version import __version__


@dataclass(frozen=True)
class Exported:
    """A written and re-read file.

    modules: layers in it; known: how many of them are found again by their names in it, tensor for tensor; sha256 of the file
    """

    path: Path
    naming: Naming
    modules: int
    known: int
    tensors: int
    sha256: str


def export_adapter(
    state: Mapping[str, Tensor],
    settings: AdapterSettings,
    keymap: KeyMap,
    *,
    path: Path,
    naming: Naming,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Writes an adapter's state dict (`Adapter.state_dict`, `load_adapter`) for another program and reads it back.

    metadata: added to what this module says of the file, winning over it; keep dates out, equal runs give equal bytes
    dtype:    of the factors; float32 loses nothing
    Raises UserError: a layer the naming has no name for; a value beyond what the dtype holds; a file that cannot be
    written or does not read back as it was written.
    """
    modules = by_module(state)
    check_names(modules, keymap, naming)
    tensors: dict[str, Tensor] = {}
    for module_path, module in modules.items():
        prefix, scale = keymap.adapter_prefix(module_path, naming), module.scale
        for name, tensor in module.tensors.items():
            precise = tensor.detach().to("cpu", torch.float32)
            folded = precise * scale if name in SCALE_CARRIERS and scale != 1.0 else precise
            tensors[f"{prefix}.{_suffix(name, naming)}"] = folded.to(dtype)
        if naming != "diffusers":
            tensors[f"{prefix}.alpha"] = torch.tensor(float(rank_of(module.tensors)), dtype=torch.float32)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                "{name} has values that are not finite in {dtype}",
                where=str(path),
                mend="write it in float32 or bfloat16; if it is not finite there either, go back to an "
                "earlier checkpoint",
                name=name,
                dtype=str(dtype).removeprefix("torch."),
            )
    sha256 = write_tensors(path, tensors, {**describe_file(settings, modules), **(metadata or {})})
    _read_back(path, tensors)
    return Exported(path, naming, len(modules), _known(path, keymap, set(modules)), len(tensors), sha256)


def check_names(paths: Iterable[str], keymap: KeyMap, naming: Naming) -> None:
    """Raises UserError for layers that could not be found again by their name in files of this naming.

    Asked before training, so that no one learns afterwards that a layer cannot be exported.
    """

    def known(path: str) -> bool:
        try:
            return keymap.module_path(keymap.adapter_prefix(path, naming)) == path
        except (KeyError, UserError):
            return False

    asked = list(paths)
    missing = [path for path in asked if not known(path)]
    if missing:
        raise UserError(
            "{count} of {total} layers have no name in {naming} files (such as {name})",
            where="method.targets",
            mend="leave these layers out of method.targets",
            count=len(missing),
            total=len(asked),
            naming=naming,
            name=missing[0],
        )


def describe_file(settings: AdapterSettings, modules: Mapping[str, object]) -> dict[str, str]:
    """Metadata of an adapter file: kohya's keys, which most programs show, and our own settings.

    The scale is folded in, so alpha is the rank whatever it was while training.
    """
    if settings.kind == "lora":
        network, args = "networks.lora", {}
    else:
        network = "lycoris.kohya"
        args = {"algo": "lokr", "factor": str(settings.factor), "full_matrix": str(settings.full_matrix)}
    return {
        "format": "pt",
        "ss_network_module": network,
        "ss_network_dim": str(settings.rank),
        "ss_network_alpha": str(settings.rank),
        "ss_network_args": json.dumps(args, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "whitetuner.version": __version__,
        "whitetuner.adapter": json.dumps(asdict(settings), sort_keys=True),
        "whitetuner.modules": str(len(modules)),
    }


def _suffix(name: str, naming: Naming) -> str:
    if naming == "diffusers":
        return file_suffix(name)
    return {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}.get(name, name)


def _known(path: Path, keymap: KeyMap, wanted: set[str]) -> int:
    """Layers that the file's own names lead to. Raises UserError (exit code 1) unless they are those that were written."""
    found = set(by_module(load_adapter(path, keymap)[1]))
    if found != wanted:
        raise UserError(
            "{count} of {total} layers are not found again by their names in the file (such as {name})",
            where=str(path),
            mend="leave them out of method.targets, and tell us",
            code=EXIT_FAILED,
            count=len(found ^ wanted),
            total=len(wanted),
            name=min(found ^ wanted),
        )
    return len(found)


def _read_back(path: Path, tensors: Mapping[str, Tensor]) -> None:
    found, _ = read_safetensors(path)
    if found.keys() != tensors.keys() or not all(torch.equal(found[name], tensors[name]) for name in tensors):
        raise UserError(
            "the file reads back other than it was written",
            where=str(path),
            mend="check the disk, then write it again with `whitetuner export` from the last checkpoint",
            code=EXIT_FAILED,
        )
