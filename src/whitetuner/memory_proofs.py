"""E4 and E5 on this machine: gradients through a quantised base, and block swap that changes no bit. For selftest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whitetuner import recipe
from whitetuner.config.load import load_config
from whitetuner.evidence import checkpoint, digest, losses
from whitetuner.family import Family, Part
from whitetuner.memory.build import Build
from whitetuner.memory.quantize import QuantLinear

#: Largest error of a weight, as a share of the largest of its row: half a step of int8; half a step of e4m3 (3 bits).
_WEIGHT_ERROR = {"int8": 0.5 / 127 + 2**-8, "fp8": 2**-4}
_PRODUCT_ERROR = 1e-5


def quantised_base(family: Family, part: Part) -> tuple[bool, str, str]:
    """E4: in every quantised layer the output and dL/dx are those of the dequantised weight, whose error is bounded."""
    product, weight, layers = 0.0, 0.0, 0
    precise = dict(family.load(Build())[part.name].named_parameters())
    for kind, bound in _WEIGHT_ERROR.items():
        module: nn.Module = family.load(Build(quantize=kind))[part.name]  # type: ignore[arg-type]
        for path, layer in module.named_modules():
            if not isinstance(layer, QuantLinear):
                continue
            layers += 1
            dense, original = QuantLinear.dequantized(layer), precise[f"{path}.weight"]
            largest = original.detach().abs().amax(1, keepdim=True).clamp_min(1e-30)
            weight = max(weight, float(((dense - original).abs() / largest).max()) / bound)
            generator = torch.Generator().manual_seed(layers)
            x = torch.randn(5, layer.in_features, generator=generator)
            bias = layer._parameters["bias"]
            found = _gradient(layer, x)
            wanted = _gradient(partial(nn.functional.linear, weight=dense, bias=bias), x)
            product = max(
                product, *(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
            )
    ok = layers > 0 and product < _PRODUCT_ERROR and weight <= 1
    return ok, f"{product:.1e} < {_PRODUCT_ERROR:.0e}", f"{layers} layers, {weight:.0%} of bound"


def _gradient(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_(True)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def swapped(values: Mapping[str, Any], blocks: int) -> tuple[bool, str, str]:
    """E5: a run with every block swapped, and one with some and recompute, against one with none; then the same of full
    training, where blocks are updated and written back. values: of the config. Hashes: adapter+full.
    """
    every = {"memory.blocks_to_swap": blocks}
    some = {"memory.blocks_to_swap": max(1, blocks // 2), "memory.gradient_checkpointing": True}
    full = {"method.kind": "full", "optimizer.lr": 1e-3}
    adapter = _runs(values, {"resident": {}, "swapped": every, "swapped-and-recomputed": some})
    whole = _runs(values, {"full": full, "full-swapped": {**every, **full}})
    pairs = zip((adapter, whole), ([h for h, _ in adapter], [h for h, _ in whole]), strict=True)
    same = all(len(set(hashes)) == 1 and all(run[1] == runs[0][1] for run in runs) for runs, hashes in pairs)
    left = f"{adapter[0][0]}+{whole[0][0]}"
    right = "+".join("/".join(dict.fromkeys(h for h, _ in runs[1:])) for runs in (adapter, whole))
    return same, left, right


def _runs(
    values: Mapping[str, Any], ways: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """(hash of the checkpoint, losses) of a run in each way."""
    found = []
    for name, more in ways.items():
        base = {**values, "run.name": name, "run.steps": 4, "save.every": 4, **more}
        result = recipe.run(load_config(None, base=base))
        found.append((digest(checkpoint(Path(result.folder), 4)), losses(result.folder)))
    return found
