"""A LoRA that is part of the frozen model while it trains, and no part of it when it draws.

Z-Image-Turbo draws in 8 steps because it was distilled; training it plainly breaks that. A de-distill adapter makes it an
ordinary model for the time of the training: it is added to the weights before anything is trained, and what is trained on
top is later used on the untouched Turbo (ostris/zimage_turbo_training_adapter; ai-toolkit calls it an assistant LoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from whitetuner.errors import UserError
from whitetuner.family import KeyMap

_KEY = "model.options.merge_adapter"
_ROLES = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}


@dataclass(frozen=True)
class Factors:
    """One layer's delta: up @ down * scale. down: (rank, in), up: (out, rank), float32 on the CPU."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        return (self.up @ self.down) * self.scale


def read_lora(path: str, keys: KeyMap) -> dict[str, Factors]:
    """Module path -> its factors, of a LoRA file in any naming that the family's key map knows.

    Raises UserError for a file that is missing, torn or no LoRA of this family.
    """
    file = Path(path.strip().strip('"')).expanduser()
    if not file.is_file() or file.suffix.lower() != ".safetensors":
        raise UserError(
            "{path} is no safetensors file" if file.exists() else "there is no file {path}",
            where=_KEY,
            mend="give the adapter's .safetensors file",
            path=file,
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(
            "this is no whole safetensors file ({reason})",
            where=str(file),
            mend="download it again",
            reason=error,
        ) from error
    modules: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        ending = next((one for one in _ROLES if name.endswith(one)), None)
        place = None if ending is None else _module(name.removesuffix(ending), keys)
        if ending is None or place is None:
            strange.append(name)
        else:
            modules.setdefault(place, {})[_ROLES[ending]] = tensor.float()
    halves = [path for path, found in modules.items() if not {"down", "up"} <= set(found)]
    if strange or halves or not modules:
        raise UserError(
            "this is no LoRA of Z-Image ({count} of {total} tensors are something else, such as {name})",
            where=str(file),
            mend="give the de-distill adapter as it is published (a LoRA), or leave the option out",
            count=len(strange) + len(halves),
            total=len(tensors),
            name=next(iter(strange + halves), "-"),
        )
    found = {}
    for place, factors in modules.items():
        rank = factors["down"].shape[0]
        alpha = factors.get("alpha", torch.tensor(float(rank)))
        found[place] = Factors(factors["down"], factors["up"], float(alpha) / rank)
    return found


def check_width(factors: Mapping[str, Factors], width: int, path: str) -> None:
    """Raises UserError unless the adapter is for a model whose blocks are this wide."""
    for place, one in factors.items():
        if place.endswith(("to_q", "to_k", "to_v")) and (one.up.shape[0], one.down.shape[1]) != (width,) * 2:
            raise UserError(
                "the adapter is for a model {theirs} wide, this one is {ours} wide",
                where=path,
                mend="give the adapter that belongs to this model",
                theirs=one.down.shape[1],
                ours=width,
            )


def additions(factors: Mapping[str, Factors]) -> dict[str, Callable[[], Tensor]]:
    """For Recast: the weight's name -> what is added to it."""
    return {f"{place}.weight": one.delta for place, one in factors.items()}


@contextmanager
def without(module: nn.Module, factors: Mapping[str, Factors], compute: Tensor) -> Iterator[None]:
    """Inside, the module computes as if the factors had not been merged into it, whatever holds its weights.

    compute: a tensor of the device and dtype that the module computes in
    """
    handles = [
        module.get_submodule(place).register_forward_hook(_taking_off(one, compute))
        for place, one in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _taking_off(factors: Factors, compute: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    down, up = factors.down.to(compute), factors.up.to(compute)

    def hook(layer: nn.Module, given: tuple[Tensor], said: Tensor) -> Tensor:
        return said - factors.scale * F.linear(F.linear(given[0], down), up)

    return hook


def _module(prefix: str, keys: KeyMap) -> str | None:
    """The module of a name in one of the spellings that trainers write."""
    bare = prefix.removeprefix("base_model.model.")
    for start in ("lora_unet_", "lora_transformer_"):
        if bare.startswith(start):
            bare = f"lycoris_{bare.removeprefix(start)}"
    return keys.module_path(bare)
