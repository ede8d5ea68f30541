"""Random tiny parts of a Z-Image folder: the real classes, small; for the tiny models of both families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from whitetuner.families.tiny_parts import qwen3_tokenizer, uneven
from whitetuner.families.z_image_facts import SHIFT

#: Of the tiny denoisers. 24 is wide enough for two heads with three axes of positions.
SIZES: dict[str, Any] = {
    "in_channels": 16,
    "dim": 24,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 4, 4],
    "axes_lens": [1024, 64, 64],
}


def write(kind: type, folder: Path, variant: str, **sizes: Any) -> None:
    """Writes the folder around a denoiser of this class. See registry.make_tiny, which has set the seed."""
    tokenizer = qwen3_tokenizer()
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=_vae(),
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=_transformer(kind, sizes),
    )
    if variant != "base":  # config.json keeps the name that a model was loaded from
        pipeline.transformer.register_to_config(_name_or_path=f"Z-Image-{variant}")
    pipeline.save_pretrained(folder)


def _transformer(kind: Any, sizes: dict[str, Any]) -> ZImageTransformer2DModel:
    transformer = kind(**SIZES, **sizes)
    for name, weight in transformer.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(weight)  # zeros would hide that they are forgotten
    return uneven(transformer)


def _text_encoder(tokens: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=tokens,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return Qwen3Model(config).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
