"""What ZImageTransformer2DModel computes, for a batch whose pictures and padded captions are all of one size.

The class takes lists, and pads, rotates and cuts sample by sample; with everything of one size the same is a handful
of matrix products, which bf16 makes a third cheaper (of the lists' version it makes nothing cheaper). For training
alone: pictures are drawn by the pipeline. tests/unit/test_nano_pretrain_zimage.py holds both equal.

Letters: B samples, L tokens, H heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: The class pads captions to a multiple of this, and counts positions from 1: pictures come after.
CAPTION_TOKENS = 32


def turns(transformer: Any, side: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (side^2 + 32, 1, D / 2) of the positions of side x side picture tokens, then a caption's."""
    picture = torch.cartesian_prod(torch.tensor([CAPTION_TOKENS + 1]), torch.arange(side), torch.arange(side))
    zero = torch.tensor([0])
    caption = torch.cartesian_prod(torch.arange(1, CAPTION_TOKENS + 1), zero, zero)
    both = transformer.rope_embedder(torch.cat([picture, caption]))[:, None]
    return both.real.contiguous(), both.imag.contiguous()


def padded(captions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(l, width) each, at most 32 long -> (B, 32, width), and (B, 32) True where there is only padding."""
    longest = [torch.cat([one, one[-1:].repeat(CAPTION_TOKENS - len(one), 1)]) for one in captions]
    lengths = torch.tensor([len(one) for one in captions])
    return torch.stack(longest), torch.arange(CAPTION_TOKENS) >= lengths[:, None]


def tokens_of(latents: Tensor) -> Tensor:
    """(B, C, 2 side, 2 side) -> (B, side^2, 4 C), the class's order: row, column, channel."""
    n, channels, height, width = latents.shape
    patches = latents.view(n, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(n, height * width // 4, 4 * channels)


def velocity(
    transformer: Any,
    tokens: Tensor,
    clock: Tensor,
    captions: Tensor,
    padding: Tensor,
    turned: tuple[Tensor, Tensor],
) -> Tensor:
    """What the class says of tokens (B, side^2, 4 C), in the same order. clock (B,): 1 - sigma. The rest as above."""
    length = tokens.shape[1]
    cosines, sines = turned
    time = transformer.t_embedder(clock * transformer.t_scale)
    x = transformer.all_x_embedder["2-1"](tokens)
    for block in transformer.noise_refiner:
        x = _block(block, x, cosines[:length], sines[:length], time)
    said = torch.where(padding[..., None], transformer.cap_pad_token, transformer.cap_embedder(captions))
    for block in transformer.context_refiner:
        said = _block(block, said, cosines[length:], sines[length:], None)
    both = torch.cat([x, said.to(x.dtype)], 1)
    for block in transformer.layers:
        both = _block(block, both, cosines, sines, time)
    return transformer.all_final_layer["2-1"](both[:, :length], c=time)


def _block(block: Any, x: Tensor, cosines: Tensor, sines: Tensor, time: Tensor | None) -> Tensor:
    if time is None:
        x = x + block.attention_norm2(_attention(block.attention, block.attention_norm1(x), cosines, sines))
        return x + block.ffn_norm2(block.feed_forward(block.ffn_norm1(x)))
    scale_1, gate_1, scale_2, gate_2 = block.adaLN_modulation(time).unsqueeze(1).chunk(4, 2)
    heard = _attention(block.attention, block.attention_norm1(x) * (1 + scale_1), cosines, sines)
    x = x + gate_1.tanh() * block.attention_norm2(heard)
    return x + gate_2.tanh() * block.ffn_norm2(block.feed_forward(block.ffn_norm1(x) * (1 + scale_2)))


def _attention(layer: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    q, k, v = (of(x).unflatten(-1, (layer.heads, -1)) for of in (layer.to_q, layer.to_k, layer.to_v))
    q, k = (_turn(one, cosines, sines).to(v.dtype) for one in (layer.norm_q(q), layer.norm_k(k)))
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    # Written out: the fused attention's backward takes three times as long on a processor at this size.
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float().softmax(-1).to(v.dtype)
    return layer.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


def _turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x (B, L, H, D): neighbours are the two parts of a complex number."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = real * cosines - imaginary * sines, real * sines + imaginary * cosines
    return torch.stack(turned, -1).flatten(-2)
