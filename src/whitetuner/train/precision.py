"""How a bf16 weight keeps what a small step adds to it.

A step of the usual size is smaller than half of what the last bit of a bf16 weight stands for, so that adding it and
rounding to the nearest changes nothing: after one step of Adam at 1e-4 only every fourth weight has moved
(docs/full-finetuning.md). Ways out, each a different price in memory:

    bf16_stochastic  rounds up or down at random, in proportion to the distance: right on average, nothing is kept
    kahan            keeps in a second bf16 number what the rounding left over (Kahan 1965; Zamirai et al. 2020,
                     arXiv 2010.06192): 2 bytes a weight
    fp32_master      keeps the low 16 bits of a float32 weight beside the bf16 one, which is its high half: 2 bytes a weight,
                     and exactly what training in float32 weights does
    fp32             weights in float32, computed with in float32
    bf16             rounds to the nearest: what is lost is lost; for comparisons only
The step itself is always computed in float32.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["bf16_stochastic", "kahan", "fp32_master", "fp32", "bf16"]

#: Bytes that are kept beside each bf16 weight.
BESIDE: dict[Precision, int] = {"bf16_stochastic": 0, "kahan": 2, "fp32_master": 2, "fp32": 0, "bf16": 0}
#: Numbers rounded at a time: what that needs beside stays below 100 MB.
_CHUNK = 1 << 22


def beside(weight: Tensor, precision: Precision) -> Tensor | None:
    """What is kept beside a bf16 weight at the start, on the CPU; None where nothing is, and beside a float32 one."""
    if weight.dtype == torch.float32 or not BESIDE[precision]:
        return None
    kind = torch.int16 if precision == "fp32_master" else torch.bfloat16
    return torch.zeros(weight.shape, dtype=kind)


def precise(weight: Tensor, kept: Tensor | None) -> Tensor:
    """The float32 number that a bf16 weight and what is kept beside it stand for; a new tensor."""
    if kept is None:
        return weight.to(torch.float32, copy=True)
    if kept.dtype == torch.int16:
        return joined(weight, kept)
    return weight.float().add_(kept)


def put(weight: Tensor, kept: Tensor | None, value: Tensor, precision: Precision, key: int) -> None:
    """Writes a float32 value into a bf16 weight and what is kept beside it. key: of the random numbers, see `key_of`."""
    if precision == "fp32_master":
        assert kept is not None
        high, low = split(value)
        weight.copy_(high)
        kept.copy_(low)
    elif precision == "kahan":
        assert kept is not None
        weight.copy_(value)
        kept.copy_(value.sub_(weight))
    elif precision == "bf16_stochastic":
        round_stochastic(weight, value, key)
    else:
        weight.copy_(value)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (bf16, int16): the high half, rounded half up in its bits, and the signed rest; `joined` takes them back.

    Rounding to nearest even would leave rests up to +32768, one more than int16 holds.
    """
    bits = value.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), low


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 number of `split`, to the bit."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16).add_(low)
    return bits.view(torch.float32)


@torch.no_grad()
def round_stochastic(target: Tensor, value: Tensor, key: int) -> None:
    """target (bf16) becomes one of the two neighbours of value (float32), the nearer one the more often: right on average.

    key: 64 bits. Each random number is a function of the key and the element's place alone, on every device.
    What is not finite stays as it is. value is overwritten.
    """
    assert target.is_contiguous() and value.dtype == torch.float32
    flat, out = value.contiguous().view(-1), target.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        bits = piece.view(torch.int32)
        added = bits + random16(start, len(piece), key, piece.device)
        added >>= 16  # toward zero in magnitude: the sign stands apart
        rounded = added.to(torch.int16).view(torch.bfloat16)
        out[start : start + _CHUNK] = torch.where(torch.isfinite(piece), rounded, piece.to(torch.bfloat16))


def random16(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """(count,) int32 from 0 to 65535, of the places start, start + 1, ... (start even), even over all keys.

    Two of them from each 32 bits: murmur3's finaliser (Appleby, public domain) twice, a half of the key before each.
    """
    assert start % 2 == 0 and start < 1 << 32
    first = start // 2
    x = torch.arange(first, first + (count + 1) // 2, dtype=torch.int32, device=device)
    for half in (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF):
        x.bitwise_xor_(_signed(half))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 0)):
            x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))
            if factor:
                x.mul_(_signed(factor))
    return torch.stack([x & 0xFFFF, (x >> 16) & 0xFFFF], dim=1).view(-1)[:count]


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number


def key_of(seed: int, step: int, name: str) -> int:
    """64 bits for one tensor in one step of a run."""
    digest = hashlib.blake2b(f"{seed}|{step}|{name}|rounding".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
