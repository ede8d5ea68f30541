"""A model's tensors as numbers that other programs take: fp8 with scales multiplied out, adapters added, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from whitetuner.adapters.deltas import Delta, delta_from
from whitetuner.adapters.state import by_module
from whitetuner.errors import UserError
from whitetuner.memory.relaid import entries_of
from whitetuner.memory.weights import SCALE_NAMES, is_fp8_extra

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Plain(Mapping[str, Tensor]):
    """A state by diffusers name, each tensor made when it is asked for.

    source:    by diffusers name, scales of fp8 weights beside them (whitetuner.memory.relaid.Relaid, TensorFiles, a dict)
    dtype:     of floating tensors; None: as they are, fp8 as bfloat16
    additions: name -> what is added to it, float32 of its shape, made when its turn comes
    Sums and products are in float32, rounded once to the result's dtype.
    """

    def __init__(
        self,
        source: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        additions: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        self.source, self.additions = source, additions or {}
        self._known = entries_of(source)
        self.entries = {}
        for name, entry in self._known.items():
            if is_fp8_extra(name):
                continue
            kind = entry.dtype
            if kind.is_floating_point:
                kind = dtype or (torch.bfloat16 if kind in _FP8 else kind)
            self.entries[name] = replace(entry, dtype=kind, num_bytes=prod(entry.shape) * kind.itemsize)

    def __getitem__(self, name: str) -> Tensor:
        wanted, tensor = self.entries[name].dtype, self.source[name]
        stem = name.removesuffix("weight")
        scale = next((stem + one for one in SCALE_NAMES if stem + one in self._known), None)
        if scale is not None and stem != name and tensor.dtype in _FP8:
            factor = self.source[scale].float().flatten()
            tensor = tensor.float() * (factor[:, None] if factor.numel() > 1 else factor)
        if name in self.additions:
            tensor = tensor.to(torch.promote_types(torch.float32, wanted)) + self.additions[name]()
        return tensor.to(wanted)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries


def deltas_of(
    state: Mapping[str, Tensor], model: Mapping[str, Tensor], where: str, strength: float = 1.0
) -> dict[str, Callable[[], Tensor]]:
    """For Plain: what an adapter (`load_adapter`) adds to which weights of a model.

    Raises UserError when the model lacks a layer of it or has it in another size.
    """
    known = entries_of(model)
    found: dict[str, Callable[[], Tensor]] = {}
    for path, module in by_module(state).items():
        name = f"{path}.weight"
        if name not in known:
            raise UserError(
                "the adapter changes {path}, which this model does not have",
                where=where,
                mend="use it with the model (and size) it was made for",
                path=path,
            )
        if tuple(known[name].shape) != module.size:
            raise UserError(
                "the adapter is for a layer {path} of {theirs}, this model's is {ours}: another model size",
                where=where,
                mend="use it with the model (and size) it was made for",
                path=path,
                theirs="{}x{}".format(*module.size),
                ours="x".join(str(side) for side in known[name].shape),
            )
        delta = delta_from(module.tensors, module.scale)
        delta.strength = strength
        found[name] = partial(_weight, delta)
    return found


def _weight(delta: Delta) -> Tensor:
    return delta.weight().detach()
