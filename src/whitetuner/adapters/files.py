"""Adapter files, our own and those of other programs, read into tensors by module path.

Read are LoKr and LoRA of this project, LyCORIS, diffusers/PEFT, kohya's scripts, musubi-tuner, ai-toolkit and
ComfyUI: they differ in the names only. The family's key map turns the names into module paths. What these
programs compute differently from each other (DoRA, Tucker, convolutions, LoHa and its kin) is refused rather
than read half. Files are never unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.adapters.state import ModuleState, file_suffix, infer_settings, rank_of
from whitetuner.errors import UserError

NAMINGS: tuple[Literal["comfyui", "diffusers", "lycoris"], ...] = ("comfyui", "diffusers", "lycoris")

#: How a tensor's name ends in files -> what it is here. Longer endings stand before those they contain.
ROLES: Mapping[str, str] = {
    **{
        f".{name}": name
        for name in ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_w1", "lokr_w2")
    },
    **{f".lora_{end}": "lora_A" for end in ("A.weight", "A.default.weight", "down.weight", "A")},
    **{f".lora_{end}": "lora_B" for end in ("B.weight", "B.default.weight", "up.weight", "B")},
    **{
        f"{join}lora.{end}.weight": role
        for join in "._"
        for end, role in (("down", "lora_A"), ("up", "lora_B"))
    },
    ".alpha": "alpha",
}
#: Endings of what is not read, and its name.
FOREIGN: Mapping[str, str] = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lokr_t1": "Tucker decomposition of a convolution",
    ".lokr_t2": "Tucker decomposition of a convolution",
    ".lora_mid.weight": "Tucker decomposition of a convolution",
    ".hada_w1_a": "LoHa",
    ".oft_blocks": "OFT",
    ".boft_blocks": "OFT",
    ".a1.weight": "GLoRA",
    ".diff": "full differences",
    ".diff_b": "full differences of biases",
}
STYLES = (
    ("lycoris_", "LyCORIS"),
    ("lora_unet_", "kohya"),
    ("lora_transformer_", "kohya"),
    ("lora_te", "kohya"),
    ("diffusion_model.", "ComfyUI"),
    ("transformer.", "diffusers"),
    ("base_model.model.", "PEFT"),
)


class Names(Protocol):
    """The part of a family's KeyMap (whitetuner.family) that adapters need."""

    def adapter_prefix(self, module_path: str, naming: Literal["comfyui", "diffusers", "lycoris"]) -> str: ...

    def module_path(self, prefix: str) -> str | None: ...


class Entry(NamedTuple):
    """One tensor of an adapter file: the name of its module in the file, and what it is of it."""

    prefix: str
    role: str


def parse(name: str) -> Entry | None:
    """What a tensor of an adapter file is; None if it is none of LoKr or LoRA."""
    for ending, role in ROLES.items():
        if name.endswith(ending):
            return Entry(name.removesuffix(ending), role)
    return None


def style_of(prefix: str) -> str:
    """Whose way of naming modules this is."""
    return next((style for start, style in STYLES if prefix.startswith(start)), "module paths")


def load_adapter(path: Path, keymap: Names) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """Reads an adapter file of any known naming: its settings, as far as all modules share them, and its
    state dict.

    Tensors are float32 on the CPU, in the names of `adapters.state`, modules in the order of their paths.
    Raises UserError, saying which: a missing, pickled, torn or empty file; no adapter; a kind that is not
    read; names that are not of this family; two namings in one file; incomplete or impossible tensors; values
    that are not finite.
    """
    tensors, _ = read_safetensors(path)
    by_prefix = sort_tensors(path, tensors)
    paths = resolve(path, list(by_prefix), keymap)
    modules = {paths[prefix]: module for prefix, module in by_prefix.items()}
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
    """The modules of a file by their names in it, each whole and possible. Raises UserError as
    `load_adapter`."""
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
            raise _mixed(path, f"{entry.prefix}: {entry.role}", name)
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


def resolve(path: Path, prefixes: list[str], keymap: Names) -> dict[str, str]:
    """The module path of each name. Raises UserError for names of another family and for two namings in one
    file."""
    found = {prefix: _module_path(prefix, keymap) for prefix in prefixes}
    unknown = [prefix for prefix, module in found.items() if module is None]
    if unknown:
        raise UserError(
            "{count} of {total} names are not of this model family (such as {name})",
            where=str(path),
            mend="use an adapter made for this family; `whitetuner inspect` tells which that is. A layer "
            "that this family keeps apart (query, key, value) must not be trained as one",
            count=len(unknown),
            total=len(prefixes),
            name=unknown[0],
        )
    paths = {prefix: module for prefix, module in found.items() if module is not None}
    styles = {style_of(prefix): prefix for prefix in prefixes}
    one_naming = any(
        all(keymap.adapter_prefix(m, naming) == p for p, m in paths.items()) for naming in NAMINGS
    )
    if len(set(paths.values())) < len(paths) or (len(styles) > 1 and not one_naming):
        first, *rest = styles.values() if len(styles) > 1 else prefixes
        raise _mixed(path, first, rest[0])
    return paths


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises UserError for a file that is missing, pickled, torn or something
    else."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, json.JSONDecodeError) as error:
        raise torn(path, error) from error


def check_file(path: Path) -> None:
    """Raises UserError unless this looks like a safetensors file from outside."""
    if not path.is_file():
        raise UserError(
            "there is no such file" if not path.exists() else "this is a folder, not a file",
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
    pickled = start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    if pickled or path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise UserError(
            "this is a pickle file, which can run any program when it is opened; such files are not read",
            where=str(path),
            mend="convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, "
            "weights_only=True), "
            '"NEW.safetensors")',
        )


def torn(path: Path, reason: Exception) -> UserError:
    return UserError(
        "this is no whole safetensors file ({reason}; {size} bytes)",
        where=str(path),
        mend="download or copy it again",
        reason=reason,
        size=path.stat().st_size,
    )


def _module_path(prefix: str, keymap: Names) -> str | None:
    candidates = [prefix, f"transformer.{prefix}"]
    bare = prefix.removeprefix("base_model.model.")
    if bare != prefix:
        candidates += [bare, f"transformer.{bare}"]
    joined = re.sub(r"^lora_(unet|transformer)_", "lycoris_", prefix)
    if joined != prefix:
        candidates.append(joined)
    return next((module for name in candidates if (module := keymap.module_path(name)) is not None), None)


def _mixed(path: Path, first: str, second: str) -> UserError:
    return UserError(
        "two ways of naming are mixed in one file (such as {first} and {second})",
        where=str(path),
        mend="`whitetuner export` writes each naming into a file of its own",
        first=first,
        second=second,
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


def _natural(path: str) -> list[tuple[int, str]]:
    """blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
