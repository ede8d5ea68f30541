"""An adapter's tensors by module path, apart from any model and any file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from whitetuner.adapters.shapes import AdapterSettings, factorization, tensor_shapes

#: The tensor of each form that a scale is folded into; exactly one of them is in every module.
SCALE_CARRIERS = ("lokr_w1", "lokr_w1_a", "lora_B")


@dataclass(frozen=True)
class AdapterWeights:
    """What is needed to apply, go on training or write an adapter.

    tensors:  module path -> parameter name (lokr_w1, lora_A, ...) -> tensor, without the scale
    scales:   module path -> alpha / rank; 1 where both factors of a LoKr are full
    settings: the shape that all modules have in common, as far as they do
    style:    whose naming the file had; metadata: the file's own
    """

    settings: AdapterSettings
    tensors: Mapping[str, Mapping[str, Tensor]]
    scales: Mapping[str, float]
    style: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """The settings as config keys: 'kind = "lokr", factor = 8, full_matrix = true'."""
        s = self.settings
        words = [f'kind = "{s.kind}"']
        if s.kind == "lokr":
            words.append(f"factor = {s.factor}")
        if s.full_matrix:
            words.append("full_matrix = true")
        else:
            words += [f"rank = {s.rank}", f"alpha = {s.rank if s.alpha is None else s.alpha:g}"]
        return ", ".join(words)


def file_suffix(name: str) -> str:
    """How this project writes a parameter: lora_A -> lora_A.weight (as PEFT does), lokr_w1 -> lokr_w1."""
    return f"{name}.weight" if name.startswith("lora_") else name


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """The rank a scale is relative to; 1 where both factors of a LoKr are full. For both low-rank W2's counts
    (ComfyUI)."""
    for name in ("lora_A", "lokr_w2_b", "lokr_w1_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return 1


def infer_settings(
    modules: Mapping[str, Mapping[str, Tensor]], scales: Mapping[str, float]
) -> AdapterSettings:
    """The settings that give these shapes; where no settings do, the nearest guess."""
    low_rank = [path for path, parts in modules.items() if not {"lokr_w1", "lokr_w2"} <= set(parts)]
    ranks = [rank_of(modules[path]) for path in low_rank]
    rank = max(set(ranks), key=ranks.count) if ranks else 1
    alphas = {scales[path] * rank_of(modules[path]) for path in low_rank}
    alpha = alphas.pop() if len(alphas) == 1 else None
    if any("lora_A" in parts for parts in modules.values()):
        return AdapterSettings("lora", rank, alpha)
    both = any("lokr_w1_a" in parts for parts in modules.values())
    lefts: set[int] = set()
    sizes = {}
    for path, parts in modules.items():
        a, b = (
            parts["lokr_w1"].shape
            if "lokr_w1" in parts
            else (len(parts["lokr_w1_a"]), parts["lokr_w1_b"].shape[1])
        )
        c, d = (
            parts["lokr_w2"].shape
            if "lokr_w2" in parts
            else (len(parts["lokr_w2_a"]), parts["lokr_w2_b"].shape[1])
        )
        sizes[path] = ((a, c), (b, d))
        lefts |= {a, b}
    fits = (
        factor
        for factor in [*sorted(lefts, reverse=True), -1]
        if all(
            factorization(one * other, factor) == (one, other)
            for pair in sizes.values()
            for one, other in pair
        )
    )
    return AdapterSettings("lokr", rank, alpha, next(fits, max(lefts)), not low_rank, both)


def follows_settings(weights: AdapterWeights) -> bool:
    """Whether every module has the shape that `weights.settings` would give it."""
    for parts in weights.tensors.values():
        shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
        if "lora_A" in parts:
            out, in_ = shapes["lora_B"][0], shapes["lora_A"][1]
        else:
            a, b = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
            c, d = shapes.get("lokr_w2") or (shapes["lokr_w2_a"][0], shapes["lokr_w2_b"][1])
            out, in_ = a * c, b * d
        if tensor_shapes(weights.settings, out, in_) != shapes:
            return False
    return True
