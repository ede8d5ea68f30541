"""Frozen linears that hold one byte a weight (row-wise int8 or fp8) and nothing dense for the backward pass.

y = x Wᵀ + b with W = diag(scale) Q: the scale of a row is applied to y (and to dL/dy), so that of W only Q
cast to x's dtype is ever made, for the time of one product, once in the forward and once more in the
backward pass. Autograd keeps Q and the scale alone; libraries that dequantise in front of F.linear keep a
dense W per layer there.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from whitetuner.errors import UserError

Kind = Literal["int8", "fp8"]
#: Largest code of a kind; scale = largest |weight| of the row / this.
LARGEST = {"int8": 127.0, "fp8": 448.0}
#: Values are brought down by this power of two before a float16 product, and the scale up: 448 * x would
#: overflow.
_FP16_SHIFT = 2.0**-9
#: Rows are quantised in pieces of at most this many weights: the float32 copy of a piece is the only extra
#: memory.
_PIECE = 1 << 24


def quantize_rows(weight: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) weights -> codes (out, in) int8 (fp8: the bits of float8_e4m3fn) and scale (out,) float32.

    A scale is rounded up to a bfloat16 number: then products in bf16 multiply by exactly this number, and a
    row gets no systematic error from a rounded scale. Raises ValueError when a weight is not finite.
    """
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
    step = max(1, _PIECE // max(1, columns))
    for start in range(0, rows, step):
        piece = weight[start : start + step].float()
        largest = piece.abs().amax(1) if columns else piece.new_zeros(piece.shape[0])
        piece_scale = _up_to_bfloat16(largest.clamp_min(1e-30) / LARGEST[kind])
        piece = piece / piece_scale[:, None]
        codes[start : start + step] = (
            piece.round_().to(torch.int8)
            if kind == "int8"
            else piece.to(torch.float8_e4m3fn).view(torch.int8)
        )
        scale[start : start + step] = piece_scale
    if not torch.isfinite(scale).all():
        raise ValueError("weights that are not finite")
    return codes, scale


def _up_to_bfloat16(scale: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 number that is not smaller, as float32. scale: positive float32."""
    return ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def decode(codes: torch.Tensor, kind: Kind, dtype: torch.dtype) -> torch.Tensor:
    """The codes as numbers of `dtype`, without their scale (exact in bfloat16, float16 and float32)."""
    return codes.to(dtype) if kind == "int8" else codes.view(torch.float8_e4m3fn).to(dtype)


def _factors(
    codes: torch.Tensor, scale: torch.Tensor, kind: Kind, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    matrix = decode(codes, kind, dtype)
    if dtype == torch.float16:
        return matrix * _FP16_SHIFT, (scale / _FP16_SHIFT).to(dtype)
    return matrix, scale.to(dtype)


class _RowScaledProduct(torch.autograd.Function):
    """x (..., in), codes (out, in), scale (out,) -> x Wᵀ (..., out). Saves codes and scale; W never needs a
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        kind: Kind,
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.kind = kind
        matrix, factor = _factors(codes, scale, kind, x.dtype)
        return F.linear(x, matrix) * factor

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        matrix, factor = _factors(codes, scale, ctx.kind, grad.dtype)
        return (grad * factor) @ matrix, None, None, None


class QuantLinear(nn.Module):
    """A frozen nn.Linear with one byte a weight.

    weight: Parameter int8 (out, in), the codes. For fp8 too it has dtype int8 (the bits): a floating dtype
            would be cast by every `module.to(dtype)` and taken for the module's compute dtype by libraries.
    scale:  Parameter float32 (out,), kept float32 by `.to(dtype)`;  bias: Parameter or None.
    Computes in x's dtype (autocast's where that is on). All of it is plain tensors: `.data` may be rebound
    to views of a transfer buffer, meta device and safetensors work, torch.compile traces it without a break.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        kind: Kind = "int8",
    ) -> None:
        super().__init__()
        assert codes.dtype == torch.int8 and scale.shape == codes.shape[:1]
        self.kind: Kind = kind
        self.out_features, self.in_features = codes.shape
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def of(cls, linear: nn.Linear, kind: Kind = "int8") -> QuantLinear:
        """The quantised twin of a linear; a linear on the meta device gives one on the meta device."""
        weight = linear.weight.detach()
        if weight.is_meta:
            codes = torch.empty(weight.shape, dtype=torch.int8, device="meta")
            scale = torch.empty(weight.shape[0], dtype=torch.float32, device="meta")
        else:
            codes, scale = quantize_rows(weight, kind)
        return cls(codes, scale, None if linear.bias is None else linear.bias.detach(), kind=kind)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The (out, in) weights that this layer stands for."""
        return (decode(self.weight, self.kind, torch.float32) * self.scale[:, None]).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _RowScaledProduct.apply(x, self.weight, self.scale, self.kind)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        exact = self.scale.data
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale.data = exact.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


def quantize_linears(module: nn.Module, kind: Kind, keep: frozenset[str] = frozenset()) -> list[str]:
    """Replaces, in place, every plain nn.Linear by its quantised twin. keep: names of weights to leave.

    Subclasses of nn.Linear are left alone (they may compute something else), and so are weights that are
    shared with another module. Returns the names of the replaced weights. Raises UserError when a weight
    trains or is not finite.
    """
    shared = _shared(module)
    replaced = []
    for path, parent in list(module.named_modules()):
        for attribute, child in list(parent.named_children()):
            name = f"{path}.{attribute}.weight".lstrip(".")
            if type(child) is not nn.Linear or name in keep or id(child.weight) in shared:
                continue
            if child.weight.requires_grad:
                raise UserError(
                    "{name} is to be trained; a quantised weight cannot be",
                    where="memory.base",
                    mend='full training needs memory.base = "bf16"; an adapter (method.kind = "lokr") trains '
                    "on a quantised base",
                    name=name,
                )
            try:
                twin = QuantLinear.of(child, kind)
            except ValueError as error:
                raise UserError(
                    "{name} cannot be quantised: {error}",
                    where="memory.base",
                    mend="the model file is damaged; download it again",
                    name=name,
                    error=error,
                ) from error
            twin.train(child.training)
            setattr(parent, attribute, twin)
            replaced.append(name)
    return replaced


def _shared(module: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds (tied embeddings)."""
    seen: set[int] = set()
    twice: set[int] = set()
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice
