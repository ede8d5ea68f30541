"""What an adapter adds to a linear layer: LoKr and LoRA, factored, over any base.

A LoKr delta is W1 kron W2 (LyCORIS: Yeh et al. 2023, arXiv 2309.14859; names and shapes as in lycoris-lora's
LokrModule):
    W1: (a, b), the small outer factor;  W2: (c, d), full or A (c, r) @ B (r, d);  out = a c, in = b d.
A LoRA delta is B (out, r) @ A (r, in) (Hu et al. 2021, arXiv 2106.09685; names as in PEFT).

Neither is ever multiplied out while training. x is seen as (tokens, b, d): one factor works on d, the other
on b, and W1 is applied where the tensor is smallest: in rank space when W2 is low-rank, else on the narrower
side of the layer. Forward and backward then cost 1.26x (rank 16) to 1.52x (full W2, factor 8) of the frozen
layer alone; building the dense delta costs four times that and keeps a matrix of the layer's size for the
backward of every layer (benchmarks/results/adapter_layer.json). It also keeps what a sum W + delta in bf16 rounds
away: after ten Adam steps at 1e-4 half of the delta.

The factors are float32 masters, cast to x's dtype at use; the scale alpha / rank is folded into the smallest
factor before that cast. Not covered, because programs disagree on what they mean: DoRA, Tucker decomposition,
convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whitetuner.adapters.shapes import AdapterSettings, tensor_shapes


def scale_of(tensors: Mapping[str, Tensor], settings: AdapterSettings) -> float:
    """1 where no factor of a LoKr is low-rank, else alpha / rank."""
    return 1.0 if {"lokr_w1", "lokr_w2"} <= set(tensors) else settings.low_rank_scale


class Delta(nn.Module):
    """Trainable float32 tensors of one layer.

    scale:    alpha / rank as trained, part of what the delta is
    strength: a factor on top, for trying an adapter out; never part of what is saved
    """

    out_features: int
    in_features: int

    def __init__(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        super().__init__()
        self.scale, self.strength = float(scale), 1.0
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().to(torch.float32, copy=True)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + delta(x). x: (..., in); y: (..., out), what the base made of x, in x's dtype; left as it is."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The whole delta, (out, in) float32, scale and strength included: for merging and checks only."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, detached (shared memory), without the scale."""
        return {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))
        return f"{shapes}, scale={self.scale:g}"


class LokrDelta(Delta):
    """kron(W1, W2) * scale. Of the two forms of W1, and of W2, one is there."""

    lokr_w1: Tensor  # (a, b)
    lokr_w1_a: Tensor  # (a, r)
    lokr_w1_b: Tensor  # (r, b)
    lokr_w2: Tensor  # (c, d)
    lokr_w2_a: Tensor  # (c, r)
    lokr_w2_b: Tensor  # (r, d)

    def __init__(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        super().__init__(tensors, scale)
        a, b = self._left().shape
        if "lokr_w2" in tensors:
            c, d = tensors["lokr_w2"].shape
        else:
            c, d = tensors["lokr_w2_a"].shape[0], tensors["lokr_w2_b"].shape[1]
        self.out_features, self.in_features = a * c, b * d

    def _left(self) -> Tensor:
        """W1 with the scale, (a, b) float32."""
        w1 = self.lokr_w1 if hasattr(self, "lokr_w1") else self.lokr_w1_a @ self.lokr_w1_b
        scale = self.scale * self.strength
        return w1 if scale == 1.0 else w1 * scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        w1 = self._left().to(x.dtype)
        a, b = w1.shape
        n = x.numel() // self.in_features
        if not hasattr(self, "lokr_w2"):  # low rank: W1 on (tokens, b, r), the smallest tensor of all
            down, up = self.lokr_w2_b.to(x.dtype), self.lokr_w2_a.to(x.dtype)
            c, r = up.shape
            t = F.linear(x.reshape(n * b, down.shape[1]), down).view(n, b, r)
            t = torch.matmul(w1, t).view(n * a, r)
            return torch.addmm(y.reshape(n * a, c), t, up.t()).view(y.shape)
        w2 = self.lokr_w2.to(x.dtype)
        c, d = w2.shape
        if b * c <= a * d:  # square or narrowing: W2 first, W1 on (tokens, b, c)
            t = F.linear(x.reshape(n * b, d), w2).view(n, b, c)
            return torch.baddbmm(y.reshape(n, a, c), w1.expand(n, a, b), t).view(y.shape)
        t = torch.matmul(w1, x.reshape(n, b, d)).view(n * a, d)
        return torch.addmm(y.reshape(n * a, c), t, w2.t()).view(y.shape)

    def weight(self) -> Tensor:
        w2 = self.lokr_w2 if hasattr(self, "lokr_w2") else self.lokr_w2_a @ self.lokr_w2_b
        return torch.kron(self._left(), w2)


class LoraDelta(Delta):
    """lora_B @ lora_A * scale."""

    lora_A: Tensor  # (r, in)
    lora_B: Tensor  # (out, r)

    def __init__(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        super().__init__(tensors, scale)
        self.out_features, self.in_features = tensors["lora_B"].shape[0], tensors["lora_A"].shape[1]

    def _down(self) -> Tensor:
        scale = self.scale * self.strength
        return self.lora_A if scale == 1.0 else self.lora_A * scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        t = F.linear(x.reshape(-1, self.in_features), self._down().to(x.dtype))
        return torch.addmm(y.reshape(-1, self.out_features), t, self.lora_B.to(x.dtype).t()).view(y.shape)

    def weight(self) -> Tensor:
        return self.lora_B @ self._down()


class Attached(nn.Module):
    """A frozen linear layer with a delta on top; for code that looks, it has the layer's own attributes."""

    def __init__(self, base: nn.Module, delta: Delta) -> None:
        super().__init__()
        self.base, self.delta, self.enabled = base, delta, True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return self.delta(x, y) if self.enabled else y

    @property
    def weight(self) -> Tensor:
        return cast(nn.Linear, self.base).weight

    @property
    def bias(self) -> Tensor | None:
        return cast(nn.Linear, self.base).bias

    @property
    def in_features(self) -> int:
        return cast(nn.Linear, self.base).in_features

    @property
    def out_features(self) -> int:
        return cast(nn.Linear, self.base).out_features


def delta_from(tensors: Mapping[str, Tensor], scale: float) -> Delta:
    """The delta that these tensors are; which kind, their names say."""
    return LoraDelta(tensors, scale) if "lora_A" in tensors else LokrDelta(tensors, scale)


def initial_delta(
    settings: AdapterSettings, out_features: int, in_features: int, generator: torch.Generator
) -> Delta:
    """A fresh delta whose weight() is zero: W2 (or its B), or lora_B, is.

    The rest is Kaiming-uniform, as in LyCORIS and PEFT.
    """
    shapes = tensor_shapes(settings, out_features, in_features)
    zero = "lora_B" if settings.kind == "lora" else "lokr_w2" if "lokr_w2" in shapes else "lokr_w2_b"
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = torch.zeros(shape)
        if name != zero:  # nn.init.kaiming_uniform_(a=sqrt(5)) is uniform within 1 / sqrt(columns)
            tensors[name].uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
    return delta_from(tensors, scale_of(tensors, settings))
