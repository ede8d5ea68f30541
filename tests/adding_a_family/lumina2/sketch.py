"""What the plan needs of Lumina-Image 2.0 without its files: the released transformer's config, and a sample's shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whitetuner.families.lumina2.spec import Lumina2Options
from whitetuner.records import Size

#: transformer/config.json of Alpha-VLLM/Lumina-Image-2.0; the rest are the class's defaults.
RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    "2.0": {"transformer": {"_class_name": "Lumina2Transformer2DModel", "cap_feat_dim": 2304}}
}


def blank(
    module: nn.Module, options: Lumina2Options, size: Size, stride_px: int, conditions: tuple[Size, ...] = ()
) -> dict[str, Tensor]:
    """The fields of one sample, as the encoders would shape them, in zeros; without a batch dimension."""
    config: Any = module.config
    rows, columns = (2 * (side // stride_px) for side in (size.height, size.width))
    return {
        "latent": torch.zeros(config.in_channels, rows, columns),
        "prompt_embeds": torch.zeros(options.max_sequence_length, config.cap_feat_dim),
    }
