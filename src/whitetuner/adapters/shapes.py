"""The shape of an adapter: which tensors of what size a layer gets, and who can read them.

No torch here: a plan is made from shapes alone. The rules are those of lycoris-lora 4.1 (LokrModule), so that
files interchange with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from whitetuner.errors import UserError

Kind = Literal["lokr", "lora"]


@dataclass(frozen=True)
class AdapterSettings:
    """The shape of an adapter ([method] of the config).

    rank:           at least 1. LoKr: a W2 of which half the longer side is not above it stays full, as in
                    LyCORIS
    alpha:          the scale of a low-rank delta is alpha / rank; None: alpha = rank, scale 1
    factor:         LoKr: size of W1, where it divides the layer's; -1: as square a split as there is
    full_matrix:    LoKr: W1 and W2 both full; rank and alpha then mean nothing, the scale is 1
    decompose_both: LoKr: W1 low-rank too, where that is smaller (in files of others; off by default)
    """

    kind: Kind = "lokr"
    rank: int = 16
    alpha: float | None = None
    factor: int = 8
    full_matrix: bool = False
    decompose_both: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("lokr", "lora"):
            raise UserError(
                "'{kind}' is no kind of adapter",
                where="method.kind",
                mend="use 'lokr' or 'lora'",
                kind=self.kind,
            )
        if self.rank < 1:
            raise UserError(
                "a rank of {rank} is too small", where="method.rank", mend="use 1 or more", rank=self.rank
            )
        if self.factor == 0 or self.factor < -1:
            raise UserError(
                "{factor} is no factor",
                where="method.factor",
                mend="use a divisor of the layers' sizes such as 4, 8 or 16, or -1 for the squarest split",
                factor=self.factor,
            )
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(
                "an alpha of {alpha} would switch the adapter off",
                where="method.alpha",
                mend="use a number above 0; alpha = rank gives a scale of 1",
                alpha=self.alpha,
            )

    @property
    def low_rank_scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Splits a layer's size into (small, large), the same split as LyCORIS' function of this name.

    A factor that divides the size is taken as it is (and sorted); else the most balanced divisor pair found
    by going up while the sum shrinks and the small one stays within `factor`; -1: no such bound.
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    bound = dimension if factor < 0 else factor
    small, large = 1, dimension
    for candidate in range(2, math.isqrt(dimension) + 1):
        if candidate > bound:
            break
        if dimension % candidate == 0:  # the sum of a divisor pair falls all the way to the square root
            small, large = candidate, dimension // candidate
    return small, large


def tensor_shapes(
    settings: AdapterSettings, out_features: int, in_features: int
) -> dict[str, tuple[int, int]]:
    """Shapes of a delta's tensors for a layer of this size, by parameter name; the rules of LyCORIS."""
    r = settings.rank
    if settings.kind == "lora":
        return {"lora_A": (r, in_features), "lora_B": (out_features, r)}
    a, c = factorization(out_features, settings.factor)
    b, d = factorization(in_features, settings.factor)
    shapes: dict[str, tuple[int, int]] = {}
    if settings.decompose_both and not settings.full_matrix and r < max(a, b) / 2:
        shapes |= {"lokr_w1_a": (a, r), "lokr_w1_b": (r, b)}
    else:
        shapes["lokr_w1"] = (a, b)
    if not settings.full_matrix and r < max(c, d) / 2:
        shapes |= {"lokr_w2_a": (c, r), "lokr_w2_b": (r, d)}
    else:
        shapes["lokr_w2"] = (c, d)
    return shapes


def count_parameters(layers: Mapping[str, tuple[int, int]], settings: AdapterSettings) -> int:
    """Parameters of an adapter over these layers (module path -> (out, in)); four bytes each in a float32
    file."""
    return sum(
        rows * columns
        for out, in_ in layers.values()
        for rows, columns in tensor_shapes(settings, out, in_).values()
    )


def reading_limits(layers: Mapping[str, tuple[int, int]], settings: AdapterSettings) -> list[UserError]:
    """What other programs will not be able to read of such an adapter.

    Nothing here stops a training, so the findings are returned, not raised. They are worth telling before it
    starts, because afterwards the factor cannot be changed. layers: module path -> (out, in)

    diffusers looks for one factor from which PEFT computes the split of every layer (utils/peft_utils.py,
    _create_lokr_config). PEFT does not sort a split: (factor, size / factor), where LyCORIS takes the smaller
    first. They part where factor^2 is above a size that the factor divides, and where it divides only some of
    the sizes.
    """
    if settings.kind != "lokr" or _diffusers_reads(layers, settings.factor):
        return []
    parted = [
        p for p, sizes in layers.items() if any(_peft_split(n, settings.factor)[0] ** 2 > n for n in sizes)
    ]
    bound = settings.factor if settings.factor > 0 else max(max(sizes) for sizes in layers.values())
    works = next((f for f in range(bound - 1, 1, -1) if _diffusers_reads(layers, f)), 1)
    return [
        UserError(
            "diffusers and PEFT will not load an adapter of factor {factor} over layers as different as "
            "these (such as {path}); ComfyUI and LyCORIS will",
            where="method.factor",
            mend="use factor {works}, or leave the small layers out of method.targets",
            factor=settings.factor,
            path=next(iter(parted or layers)),
            works=works,
        )
    ]


def _peft_split(size: int, factor: int) -> tuple[int, int]:
    return (factor, size // factor) if factor > 0 and size % factor == 0 else factorization(size, factor)


def _diffusers_reads(layers: Mapping[str, tuple[int, int]], factor: int) -> bool:
    splits = {size: factorization(size, factor) for sizes in layers.values() for size in sizes}
    candidates = {factorization(out, factor)[0] for out, _ in layers.values()} | {-1}
    return any(all(_peft_split(n, c) == split for n, split in splits.items()) for c in candidates)
