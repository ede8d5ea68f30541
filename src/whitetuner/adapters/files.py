"""Adapter files, our own and those of other programs, read into a state dict; nothing is ever unpickled.

What programs compute differently from each other (DoRA, Tucker decomposition, convolutions), and LoHa and its kin, are
refused rather than read half.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whitetuner.adapters.names import FOREIGN, Names, Target, mixed, parse, resolve
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.adapters.state import ModuleState, file_suffix, infer_settings, rank_of
from whitetuner.errors import UserError

#: safetensors' names of dtypes -> torch's.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_adapter(path: Path, keymap: Names) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """Reads an adapter file of any known naming: its settings, as far as all modules share them, and its state dict.

    Tensors are float32 on the CPU, in the names of `adapters.state`, modules in the order of their paths.
    Raises UserError, saying which: a missing, pickled, torn or empty file; no adapter; a kind that is not read; names
    that are not of this family; two namings in one file; incomplete or impossible tensors; values that are not finite.
    """
    tensors, _ = read_safetensors(path)
    by_prefix = sort_tensors(path, tensors)
    meant = resolve(path, {prefix: module.size for prefix, module in by_prefix.items()}, keymap)
    modules = {t.path: _rows(path, prefix, by_prefix[prefix], t) for prefix, ts in meant.items() for t in ts}
    state: dict[str, Tensor] = {}
    for module_path in sorted(modules, key=_natural):
        module = modules[module_path]
        for name, tensor in module.tensors.items():
            state[f"{module_path}.{file_suffix(name)}"] = tensor.to(torch.float32)
        if module.scale != 1.0:
            state[f"{module_path}.alpha"] = torch.tensor(
                module.scale * rank_of(module.tensors), dtype=torch.float32
            )
    return infer_settings(modules), state


def sort_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, ModuleState]:
    """The modules of a file by their names in it, each whole and possible. Raises UserError as `load_adapter`."""
    modules: dict[str, ModuleState] = {}
    strange = []
    for name, tensor in tensors.items():
        foreign = next((kind for ending, kind in FOREIGN.items() if name.endswith(ending)), None)
        if foreign is not None:
            raise UserError(
                "the file holds {kind} ({name}), which is not read here",
                where=str(path),
                mend="use a LoKr or LoRA of linear layers",
                kind=foreign,
                name=name,
            )
        entry = parse(name)
        if entry is None:
            strange.append(name)
            continue
        module = modules.setdefault(entry.prefix, ModuleState())
        if entry.role in module.tensors:
            raise mixed(path, f"{entry.prefix}, {entry.role}", name)
        if entry.role == "alpha":
            module.alpha = tensor
        else:
            module.tensors[entry.role] = tensor
    if strange or not modules:
        raise UserError(
            "this is no LoKr or LoRA file: {count} of its {total} tensors are something else (such as "
            "{name})",
            where=str(path),
            mend="`whitetuner inspect` tells what a file is",
            count=len(strange),
            total=len(tensors),
            name=strange[0] if strange else "-",
        )
    for prefix, module in modules.items():
        _check(path, prefix, module)
    if len({"lora_A" in module.tensors for module in modules.values()}) > 1:
        raise UserError(
            "the file mixes LoKr and LoRA", where=str(path), mend="use a file that holds one kind"
        )
    return modules


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises UserError for a file that is missing, pickled, torn or something else."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, json.JSONDecodeError) as error:
        raise torn(path, error) from error


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_safetensors`, but shapes and dtypes only (tensors on "meta"): nothing of the size of the file is read."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            shapes = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, json.JSONDecodeError) as error:
        raise torn(path, error) from error
    return {
        name: torch.empty(shape, dtype=DTYPES.get(dtype, torch.uint8), device="meta")
        for name, (shape, dtype) in shapes.items()
    }, metadata


def check_file(path: Path) -> None:
    """Raises UserError unless this looks like a safetensors file from outside."""
    if not path.is_file():
        raise UserError(
            "this is a folder, not a file" if path.exists() else "there is no such file",
            where=str(path),
            mend="give the path of a .safetensors file",
        )
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            "this is a Git LFS pointer; the file itself was not downloaded",
            where=str(path),
            mend="run `git lfs pull` in its folder, or download the file from its page",
        )
    if start.startswith(b"GGUF"):
        raise UserError(
            "this is a GGUF file, whose numbers are packed for drawing; it is not read here",
            where=str(path),
            mend="give the bf16, fp16 or fp8 file of this model",
        )
    pickled = start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    if pickled or path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise UserError(
            "this is a pickle file, which can run any program when it is opened; such files are not read",
            where=str(path),
            mend="convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            "'NEW.safetensors')",
        )


def torn(path: Path, reason: Exception) -> UserError:
    """What is told of a file whose header or length is wrong."""
    return UserError(
        "this is no whole safetensors file ({reason}; {size} bytes)",
        where=str(path),
        mend="download or copy it again",
        reason=reason,
        size=path.stat().st_size,
    )


def _check(path: Path, prefix: str, module: ModuleState) -> None:
    """Raises UserError unless the tensors make one delta."""

    def wrong(what: str, **values: Any) -> UserError:
        mend = "download it again, or have its program write it anew"
        return UserError(what, where=str(path), mend=mend, prefix=prefix, **values)

    tensors = module.tensors
    names = set(tensors)
    whole = any(
        names == {*w1, *w2}
        for w1 in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for w2 in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    )
    if names != {"lora_A", "lora_B"} and not whole:
        raise wrong("{prefix} is incomplete: it has only {names}", names=", ".join(sorted(names)) or "alpha")
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or 0 in tensor.shape:
            shape = tuple(tensor.shape)
            raise wrong(
                "{prefix}.{name} has the shape {shape}; only linear layers are read", name=name, shape=shape
            )
        if not tensor.is_floating_point():
            raise wrong("{prefix}.{name} holds whole numbers, no weights", name=name)
        if not bool(torch.isfinite(tensor).all()):
            raise wrong("{prefix}.{name} holds values that are not finite", name=name)
    for left, right in (("lora_B", "lora_A"), ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")):
        if left in names and tensors[left].shape[1] != tensors[right].shape[0]:
            raise wrong(
                "{prefix} does not fit together: {left} and {right} differ in rank", left=left, right=right
            )
    if module.alpha is not None and (
        module.alpha.numel() != 1 or not bool(torch.isfinite(module.alpha).all())
    ):
        raise wrong("{prefix}.alpha is no number")


def _rows(path: Path, prefix: str, module: ModuleState, target: Target) -> ModuleState:
    """The part of a module that belongs to one layer: rows of the delta, which for a LoRA are rows of B."""
    if target.rows is None:
        return module
    if "lora_B" not in module.tensors:
        raise UserError(
            "{prefix} is one LoKr over layers that this family keeps apart (such as {layer}); it cannot be "
            "taken apart",
            where=str(path),
            mend="merge it into the model in ComfyUI, or train anew",
            prefix=prefix,
            layer=target.path,
        )
    up = module.tensors["lora_B"][target.rows].contiguous()
    return ModuleState({"lora_A": module.tensors["lora_A"], "lora_B": up}, module.alpha)


def _natural(path: str) -> list[tuple[int, str]]:
    """blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
