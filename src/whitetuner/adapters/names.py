"""The names that tensors of adapters have in files of different programs, and which layers they mean.

LoKr and LoRA of this project, LyCORIS, diffusers/PEFT, kohya's scripts, musubi-tuner, ai-toolkit and ComfyUI differ in names
only. A name is a module, in the spelling of diffusers or of the model's first release, and what of it the tensor is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from whitetuner.errors import UserError

Naming = Literal["comfyui", "diffusers", "lycoris"]
NAMINGS: tuple[Naming, ...] = ("comfyui", "diffusers", "lycoris")

_LOKR = ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_w1", "lokr_w2")
_LORA = {
    "lora_A": ("A.weight", "A.default.weight", "down.weight"),
    "lora_B": ("B.weight", "B.default.weight", "up.weight"),
}
#: How a tensor's name ends -> what it is.
ROLES: Mapping[str, str] = {
    **{f".{name}": name for name in _LOKR},
    **{f".lora_{ending}": role for role, endings in _LORA.items() for ending in endings},
    **{
        f"{join}lora.{end}.weight": role
        for join in "._"
        for end, role in (("down", "lora_A"), ("up", "lora_B"))
    },
    ".alpha": "alpha",
}
#: How the name of a tensor ends that is not read, and what it belongs to.
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
STYLES: Mapping[str, str] = {
    "lycoris_": "LyCORIS",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lora_te": "kohya",
    "diffusion_model.": "ComfyUI",
    "transformer.": "diffusers",
    "base_model.model.": "PEFT",
}


class Names(Protocol):
    """The part of a family's KeyMap (whitetuner.family) that adapters need."""

    def adapter_prefix(self, module_path: str, naming: Naming) -> str: ...

    def module_path(self, prefix: str) -> str | None: ...

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class Entry(NamedTuple):
    """A tensor of an adapter file: the name of its module there, and what it is of it."""

    prefix: str
    role: str


class Target(NamedTuple):
    """A layer that a module of a file stands for. rows: which rows of the module's output are its, None: all in order."""

    path: str
    rows: Tensor | None


def parse(name: str) -> Entry | None:
    """What a tensor of an adapter file is; None if it is none of LoKr or LoRA."""
    return next(
        (Entry(name.removesuffix(end), role) for end, role in ROLES.items() if name.endswith(end)), None
    )


def style_of(prefix: str) -> str:
    """Whose way of naming modules this is."""
    return next((style for start, style in STYLES.items() if prefix.startswith(start)), "module paths")


def targets(prefix: str, out_features: int, keymap: Names) -> list[Target]:
    """The layers that a module name means; none for a name that is not of this family.

    Names of the first release may fuse layers that diffusers keeps apart (query, key and value below each other) or order
    rows otherwise. The key map knows how: it converts a matrix of row numbers as it would convert the weight.
    """
    bare = prefix.removeprefix("base_model.model.")
    spellings = [prefix, bare, f"transformer.{bare}"]
    for start in ("lora_unet_", "lora_transformer_"):
        if prefix.startswith(start):
            spellings.append(f"lycoris_{prefix.removeprefix(start)}")
    for name in spellings:
        path = keymap.module_path(name)
        if path is not None:
            return [Target(path, None)]
    rows = torch.arange(out_features).unsqueeze(1)
    for name in _original_spellings(bare):
        try:
            found = keymap.from_original({f"{name}.weight": rows})
        except (KeyError, UserError):  # not a name of this family
            continue
        return [
            Target(path.removesuffix(".weight"), None if torch.equal(part, rows) else part.flatten())
            for path, part in found.items()
        ]
    return []


def _original_spellings(name: str) -> Iterator[str]:
    """diffusion_model.a.b -> a.b;  lora_unet_a_b_c -> a_b_c, a.b_c, a_b.c, a.b.c (which underscores were dots is lost)."""
    if not name.startswith("lora_unet_"):
        yield name.removeprefix("diffusion_model.")
        return
    words = name.removeprefix("lora_unet_").split("_")
    if len(words) <= 12:
        for joins in itertools.product("._", repeat=len(words) - 1):
            yield words[0] + "".join(join + word for join, word in zip(joins, words[1:], strict=True))


def resolve(path: Path, sizes: Mapping[str, tuple[int, int]], keymap: Names) -> dict[str, list[Target]]:
    """The layers of each module name of a file. sizes: name -> (out, in).

    Raises UserError for names of another family and for two namings in one file.
    """
    found = {prefix: targets(prefix, out, keymap) for prefix, (out, _) in sizes.items()}
    unknown = [prefix for prefix, meant in found.items() if not meant]
    if unknown:
        raise UserError(
            "{count} of {total} names are not of this model family (such as {name})",
            where=str(path),
            mend="use an adapter that was made for this family; `whitetuner inspect` tells which one that is",
            count=len(unknown),
            total=len(found),
            name=unknown[0],
        )
    paths = [target.path for meant in found.values() for target in meant]
    if len(set(paths)) < len(paths) or not _one_naming(found, keymap):
        first = {style_of(prefix): prefix for prefix in found}
        raise mixed(path, *(list(first.values()) if len(first) > 1 else list(found))[:2])
    return found


def _one_naming(found: Mapping[str, Sequence[Target]], keymap: Names) -> bool:
    """One style throughout, or that of one program, which may need two (ComfyUI does for FLUX.2)."""
    if len({style_of(prefix) for prefix in found}) == 1:
        return True
    return any(
        all(
            len(meant) == 1 and keymap.adapter_prefix(meant[0].path, naming) == p
            for p, meant in found.items()
        )
        for naming in NAMINGS
    )


def mixed(path: Path, first: str, second: str) -> UserError:
    """What is told of a file whose modules are named in two ways; first, second: a name of each."""
    return UserError(
        "two ways of naming are mixed in one file (such as {first} and {second})",
        where=str(path),
        mend="`whitetuner export` writes each naming into a file of its own",
        first=first,
        second=second,
    )
