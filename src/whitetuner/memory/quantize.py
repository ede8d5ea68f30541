"""Frozen linears that hold one byte a weight (row-wise int8 or fp8), or half of one (nf4), and nothing dense
for the backward pass.

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

Kind = Literal["int8", "fp8", "nf4"]
#: Largest code of a kind; scale = largest |weight| of the row / this.
LARGEST = {"int8": 127.0, "fp8": 448.0}
#: Values are brought down by this power of two before a float16 product, and the scale up: 448 * x would
#: overflow.
_FP16_SHIFT = 2.0**-9
#: Rows are quantised in pieces of at most this many weights: the float32 copy of a piece is the only extra
#: memory.
_PIECE = 1 << 24
_NF4_BLOCK = 64


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


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) weights, in even -> codes (out, in / 2) int8, two a byte, and scale float32, one per 64
    weights.

    4-bit NormalFloat (Dettmers et al., QLoRA, 2023) by bitsandbytes. Raises ValueError when a weight is not
    finite.
    """
    require_bitsandbytes()
    codes, scale = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), _NF4_BLOCK, "nf4", torch.uint8)
    if not torch.isfinite(scale).all():
        raise ValueError("weights that are not finite")
    return codes.view(torch.int8).view(weight.shape[0], -1), scale.float()


def quantize_weight(weight: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale of any kind; a weight on the meta device gives both on the meta device."""
    if not weight.is_meta:
        return quantize_nf4(weight) if kind == "nf4" else quantize_rows(weight, kind)
    rows, columns = weight.shape
    if kind == "nf4":
        require_bitsandbytes()
        shapes = (rows, columns // 2), (-(-rows * columns // _NF4_BLOCK),)
    else:
        shapes = (rows, columns), (rows,)
    codes = torch.empty(shapes[0], dtype=torch.int8, device="meta")
    return codes, torch.empty(shapes[1], dtype=torch.float32, device="meta")


def require_bitsandbytes() -> None:
    """Imports bitsandbytes, which registers its operators with torch. Raises UserError when it is not
    installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "nf4 needs bitsandbytes, which is not installed ({error})",
            where="memory.base",
            mend='install it with: pip install bitsandbytes   or choose memory.base = "int8"',
            error=error,
        ) from error


def _nf4_weight(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    shape = (codes.shape[0], codes.shape[1] * 2)
    packed = codes.view(torch.uint8).view(-1, 1)
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scale, _NF4_BLOCK, "nf4", shape, dtype)


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


class _Nf4Product(torch.autograd.Function):
    """As _RowScaledProduct, for nf4: the dense W lives during one product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(x, _nf4_weight(codes, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        return grad @ _nf4_weight(codes, scale, grad.dtype), None, None


class QuantLinear(nn.Module):
    """A frozen nn.Linear with one byte a weight, or half of one.

    weight: Parameter int8, the codes: (out, in), nf4 (out, in / 2). For fp8 too it has dtype int8 (the
            bits): a floating dtype would be cast by every `module.to(dtype)` and taken for the module's
            compute dtype.
    scale:  Parameter float32, kept so by `.to(dtype)`: (out,), nf4 (out * in / 64,);  bias: Parameter or
            None.
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
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32
        self.kind: Kind = kind
        self.out_features = codes.shape[0]
        self.in_features = codes.shape[1] * (2 if kind == "nf4" else 1)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def of(cls, linear: nn.Linear, kind: Kind = "int8") -> QuantLinear:
        """The quantised twin of a linear; a linear on the meta device gives one on the meta device."""
        codes, scale = quantize_weight(linear.weight.detach(), kind)
        return cls(codes, scale, None if linear.bias is None else linear.bias.detach(), kind=kind)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The (out, in) weights that this layer stands for."""
        if self.kind == "nf4":
            return _nf4_weight(self.weight, self.scale, torch.float32).to(dtype)
        return (decode(self.weight, self.kind, torch.float32) * self.scale[:, None]).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.kind == "nf4":
            y = _Nf4Product.apply(x, self.weight, self.scale)
        else:
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
    shared with another module, and for nf4 those of odd width. Returns the names of the replaced weights.
    Raises UserError when a weight trains or is not finite.
    """
    shared = _shared(module)
    replaced = []
    for path, parent in list(module.named_modules()):
        for attribute, child in list(parent.named_children()):
            name = f"{path}.{attribute}.weight".lstrip(".")
            if type(child) is not nn.Linear or name in keep or id(child.weight) in shared:
                continue
            if kind == "nf4" and child.in_features % 2:
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
