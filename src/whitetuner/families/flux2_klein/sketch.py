"""What the plan needs of FLUX.2 Klein without its files: the released transformers' configs, and a sample's shapes.

Configs from the released folders' transformer/config.json (reference: diffusers transformer_flux2.py; only what differs from
the class's defaults and what other code reads).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whitetuner.families.flux2_klein.spec import KleinOptions
from whitetuner.records import Size

_COMMON = {"_class_name": "Flux2Transformer2DModel", "in_channels": 128, "guidance_embeds": False}
_4B = {
    **_COMMON,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}
_9B = {
    **_COMMON,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}

RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    "base-4b": {"transformer": _4B},
    "base-9b": {"transformer": _9B},
    "distilled": {"transformer": _4B},
}


def blank(
    module: Any, options: KleinOptions, size: Size, stride_px: int, conditions: tuple[Size, ...] = ()
) -> dict[str, Tensor]:
    """The fields of one sample, as the encoders would shape them, in zeros; without a batch dimension."""
    channels, width = module.config.in_channels, module.config.joint_attention_dim
    fields = {
        "latent": torch.zeros(channels, size.height // stride_px, size.width // stride_px),
        "prompt_embeds": torch.zeros(options.max_sequence_length, width),
    }
    if conditions:
        sides = [(one.height // stride_px, one.width // stride_px) for one in conditions]
        fields["reference_latents"] = torch.zeros(sum(rows * columns for rows, columns in sides), channels)
        fields["reference_sizes"] = torch.tensor(sides)
    return fields
