"""An adapter's state dict, apart from any model: one flat dict in diffusers names, the same everywhere in
this project.

<path>.lokr_w1, .lokr_w1_a, .lokr_w1_b, .lokr_w2, .lokr_w2_a, .lokr_w2_b    or    <path>.lora_A.weight,
.lora_B.weight <path>.alpha    where alpha / rank is not 1, and only there
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from whitetuner.adapters.shapes import AdapterSettings, factorization

#: The tensor of each form that a scale is folded into; exactly one of them is in every module.
SCALE_CARRIERS = ("lokr_w1", "lokr_w1_a", "lora_B")

#: Factors behind a rank: their inputs are its few numbers, where those of the factor before it are the layer's many. LoRA+
#: (Hayou et al. 2024, arXiv 2402.12354, section 4) derives from that, not from which of the two starts at zero, that these
#: may learn faster. The other factor of a LoKr has a few inputs on each side and stays as it is.
BEHIND_RANK = ("lora_B", "lokr_w2_a")


@dataclass
class ModuleState:
    """One module's tensors by parameter name (lokr_w1, lora_A, ...), and its alpha / rank."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: Tensor | None = None

    @property
    def scale(self) -> float:
        """1 where both factors of a LoKr are full or no alpha is told."""
        if self.alpha is None or {"lokr_w1", "lokr_w2"} <= set(self.tensors):
            return 1.0
        return float(self.alpha) / rank_of(self.tensors)

    @property
    def size(self) -> tuple[int, int]:
        """(out, in) of the layer it is for."""
        t = self.tensors
        if "lora_A" in t:
            return t["lora_B"].shape[0], t["lora_A"].shape[1]
        (a, c), (b, d) = self.splits
        return a * c, b * d

    @property
    def splits(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """LoKr: how out and in are split, (a, c) and (b, d)."""
        t = self.tensors
        a, b = t["lokr_w1"].shape if "lokr_w1" in t else (t["lokr_w1_a"].shape[0], t["lokr_w1_b"].shape[1])
        c, d = t["lokr_w2"].shape if "lokr_w2" in t else (t["lokr_w2_a"].shape[0], t["lokr_w2_b"].shape[1])
        return (a, c), (b, d)


def file_suffix(name: str) -> str:
    """How a parameter is written: lora_A -> lora_A.weight (as PEFT does), lokr_w1 -> lokr_w1."""
    return f"{name}.weight" if name.startswith("lora_") else name


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """The rank that a scale is relative to; 1 where both factors of a LoKr are full.

    Where both are low-rank, W2's counts, as in ComfyUI.
    """
    for name in ("lora_A", "lokr_w2_b", "lokr_w1_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return 1


def by_module(state: Mapping[str, Tensor]) -> dict[str, ModuleState]:
    """The modules of a state dict, in its order. Names must be those above, as `files.load_adapter` gives
    them."""
    modules: dict[str, ModuleState] = {}
    for name, tensor in state.items():
        path, _, last = name.removesuffix(".weight").rpartition(".")
        module = modules.setdefault(path, ModuleState())
        if last == "alpha":
            module.alpha = tensor
        else:
            module.tensors[last] = tensor
    return modules


def infer_settings(modules: Mapping[str, ModuleState]) -> AdapterSettings:
    """The settings that give these shapes; where no settings do (mixed ranks, unbalanced splits), the
    nearest."""
    low_rank = [m for m in modules.values() if not {"lokr_w1", "lokr_w2"} <= set(m.tensors)]
    ranks = [rank_of(module.tensors) for module in low_rank]
    rank = max(sorted(set(ranks)), key=ranks.count) if ranks else 1
    alphas = {module.scale * rank_of(module.tensors) for module in low_rank}
    alpha = alphas.pop() if len(alphas) == 1 else None
    if any("lora_A" in module.tensors for module in modules.values()):
        return AdapterSettings("lora", rank, alpha)
    splits = [split for module in modules.values() for split in module.splits]
    candidates = [*sorted({one for one, _ in splits}, reverse=True), -1]
    fits = (
        f for f in candidates if all(factorization(one * other, f) == (one, other) for one, other in splits)
    )
    both = any("lokr_w1_a" in module.tensors for module in modules.values())
    return AdapterSettings("lokr", rank, alpha, next(fits, candidates[0]), not low_rank, both)


def describe(settings: AdapterSettings) -> str:
    """Settings as config keys: 'kind = "lokr", factor = 8, full_matrix = true'."""
    words = [f'kind = "{settings.kind}"']
    if settings.kind == "lokr":
        words.append(f"factor = {settings.factor}")
    if settings.full_matrix:
        words.append("full_matrix = true")
    else:
        alpha = settings.rank if settings.alpha is None else settings.alpha
        words += [f"rank = {settings.rank}", f"alpha = {alpha:g}"]
    return ", ".join(words)
