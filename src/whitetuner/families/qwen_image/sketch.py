"""What the plan needs of Qwen-Image without its files: the released transformers' configs, and a sample's shapes.

All four are one architecture (config.json of the released folders; the class's defaults are theirs): 60 blocks, 20.43 B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whitetuner.families.qwen_image.encoders import SEEN_AREA_PX
from whitetuner.families.qwen_image.spec import QwenImageOptions
from whitetuner.records import Size

_COMMON = {
    "_class_name": "QwenImageTransformer2DModel",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 3584,
}

RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    "t2i": {"transformer": _COMMON},
    "edit": {"transformer": _COMMON},
    "edit-2509": {"transformer": _COMMON},
    "edit-2511": {"transformer": {**_COMMON, "zero_cond_t": True}},
}
#: Pixels of a side that one token of the language model sees (patches of 14, merged 2x2).
_SEEN_PX = 28
#: Tokens around a picture: "Picture 1: ", where it starts and where it ends. (Rounding of its sides: 10 % above.)
_AROUND = 7


def blank(
    module: nn.Module,
    options: QwenImageOptions,
    size: Size,
    stride_px: int,
    conditions: tuple[Size, ...] = (),
) -> dict[str, Tensor]:
    """The fields of one sample, as the encoders would shape them, in zeros; without a batch dimension.

    An edit's text: max_sequence_length tokens of words, and those of its pictures. Edit, which shows the language model the
    picture that the VAE sees, is the more hungry one; where nothing tells which Edit it is, one picture is reckoned as its.
    """
    config: Any = module.config
    channels = int(config.in_channels)
    rows, columns = size.height // stride_px, size.width // stride_px
    numbered = (
        options.variant in ("edit-2509", "edit-2511") or len(conditions) > 1 or bool(config.zero_cond_t)
    )
    words = options.max_sequence_length
    for one in conditions:
        area = SEEN_AREA_PX if numbered else max(SEEN_AREA_PX, one.width * one.height)
        words += round(1.1 * area / _SEEN_PX**2) + _AROUND
    fields = {
        "latent": torch.zeros(channels // 4, 2 * rows, 2 * columns),
        "prompt_embeds": torch.zeros(words, int(config.joint_attention_dim)),
    }
    if conditions:
        sides = [(one.height // stride_px, one.width // stride_px) for one in conditions]
        fields["reference_latents"] = torch.zeros(sum(a * b for a, b in sides), channels)
        fields["reference_sizes"] = torch.tensor(sides)
    return fields
