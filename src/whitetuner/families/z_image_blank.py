"""A sample of Z-Image in zeros, for the plan of both families."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whitetuner.families.z_image_facts import ZImageOptions
from whitetuner.records import Size


def blank(
    module: nn.Module, options: ZImageOptions, size: Size, stride_px: int, conditions: tuple[Size, ...] = ()
) -> dict[str, Tensor]:
    """The fields of one sample, as the encoders would shape them, in zeros; without a batch dimension."""
    config: Any = module.config
    # A token is 2x2 latent pixels.
    rows, columns = (2 * (side // stride_px) for side in (size.height, size.width))
    return {
        "latent": torch.zeros(config.in_channels, rows, columns),
        "prompt_embeds": torch.zeros(options.max_sequence_length, config.cap_feat_dim),
    }
