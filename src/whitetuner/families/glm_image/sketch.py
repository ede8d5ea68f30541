"""What the plan needs of GLM-Image without its files: the released transformer's config, and a sample's shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whitetuner.families.glm_image.spec import GlmImageOptions
from whitetuner.records import Size

_RELEASED = {
    "_class_name": "GlmImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 30,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "text_embed_dim": 1472,
    "time_embed_dim": 512,
    "condition_dim": 256,
    "prior_vq_quantizer_codebook_size": 16384,
}

#: One model, 6.9 B parameters, for both tasks.
RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    "t2i": {"transformer": _RELEASED},
    "edit": {"transformer": _RELEASED},
}
#: name of an encoder -> part -> config.json of the released model. The language model's is what transformers takes for granted
#: of a GlmImageConfig: 40 layers of 4096, a ViT of 40 layers of 1536.
ENCODERS: dict[str, dict[str, dict[str, Any]]] = {
    "plan": {"vision_language_encoder": {"model_type": "glm_image"}}
}
#: Bytes of quoted text that are reckoned with: a full poster. Most captions quote nothing.
_GLYPHS = 256


def blank(
    module: nn.Module,
    options: GlmImageOptions,
    size: Size,
    stride_px: int,
    conditions: tuple[Size, ...] = (),
) -> dict[str, Tensor]:
    """The fields of one sample, as the encoders would shape them, in zeros; without a batch dimension."""
    config: Any = module.config
    channels = int(config.in_channels)
    rows, columns = size.height // stride_px, size.width // stride_px
    tokens = torch.zeros(rows, columns, dtype=torch.int32)
    fields = {
        "latent": torch.zeros(channels, 4 * rows, 4 * columns),
        "glyph_embeds": torch.zeros(min(_GLYPHS, options.max_sequence_length), int(config.text_embed_dim)),
        "dropped": torch.tensor(False),
        "prior_tokens": tokens,
    }
    if options.generated_prior:
        fields["generated_tokens"] = tokens
    if conditions:
        sizes = [(4 * one.height // stride_px, 4 * one.width // stride_px) for one in conditions]
        latents = sum(high * wide for high, wide in sizes)
        fields["reference_latents"] = torch.zeros(latents, channels)
        fields["reference_sizes"] = torch.tensor(sizes)
        fields["reference_tokens"] = torch.zeros(latents // 16, dtype=torch.int32)
    return fields
