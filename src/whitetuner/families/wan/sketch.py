"""What the plan needs of WAN without its files: the released denoisers' configs, and a sample's shapes.

config.json of the released folders (huggingface.co/Wan-AI, *-Diffusers); the class's defaults are the 14B T2V's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whitetuner.families.wan.spec import FRAMES_STEP, TEXT_TOKENS, WanOptions
from whitetuner.records import Size

_COMMON = {"_class_name": "WanTransformer3DModel", "text_dim": 4096, "freq_dim": 256}
_14B = {**_COMMON, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824, "out_channels": 16}
_T2V = {**_14B, "in_channels": 16}
_I2V = {**_14B, "in_channels": 36}

RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    "i2v-2.1": {"transformer": {**_I2V, "image_dim": 1280, "added_kv_proj_dim": 5120}},
    "i2v-2.2": {"transformer": _I2V, "transformer_2": _I2V},
    "t2v-2.1": {"transformer": _T2V},
    "t2v-2.2": {"transformer": _T2V, "transformer_2": _T2V},
    "ti2v-5b": {
        "transformer": {
            **_COMMON,
            "num_layers": 30,
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
        }
    },
}
#: Tokens of CLIP ViT-H/14 at 224 px: 16 x 16 patches and one for the whole picture.
_IMAGE_TOKENS = 257
#: Of the CLIP of the tiny model (tiny.py): 2 x 2 patches.
_TINY_IMAGE_TOKENS = 5


def blank(
    module: nn.Module,
    options: WanOptions,
    size: Size,
    stride_px: int,
    conditions: tuple[Size, ...] = (),
) -> dict[str, Tensor]:
    """The fields of one sample, as the encoders would shape them, in zeros; without a batch dimension."""
    config: Any = module.config
    frames = (size.frames - 1) // FRAMES_STEP + 1
    rows, columns = 2 * (size.height // stride_px), 2 * (size.width // stride_px)
    fields = {
        "latent": torch.zeros(config.out_channels, frames, rows, columns),
        "prompt_embeds": torch.zeros(TEXT_TOKENS, int(config.text_dim)),
    }
    if conditions:
        known = frames if config.in_channels > config.out_channels else 1
        fields["first_frame_latents"] = torch.zeros(config.out_channels, known, rows, columns)
    if config.image_dim:
        tokens = _IMAGE_TOKENS if int(config.image_dim) == 1280 else _TINY_IMAGE_TOKENS
        fields["image_embeds"] = torch.zeros(tokens, config.image_dim)
    return fields
