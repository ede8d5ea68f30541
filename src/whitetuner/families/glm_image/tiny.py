"""A random tiny GLM-Image as a diffusers folder: the real classes made small; it draws noise, and plans pictures in codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from whitetuner.families.glm_image.spec import BASE_SHIFT, BASE_TOKENS, MAX_SHIFT
from whitetuner.families.tiny_parts import byte_level_bpe

#: Codes (16384 in the released model), and with the marks where a picture starts and ends and room (16512).
_CODES, _VISION = 32, 40
_SPECIAL = ("<|endoftext|>", "<|image|>", "<sop>", "<eop>")
_WORDS = ("a photo of a red circle on a white background", "make it blue", "0123456789 ")
#: A picture is a start mark, a place for its codes and an end mark; words stay as they are.
_CHAT = (
    "{%- for message in messages -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|dit_token_32|><|image|><|dit_token_33|>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
)


def make(folder: Path, variant: str) -> None:
    """Writes the folder, one for every variant. See registry.make_tiny, which has set the seed."""
    words = _tokenizer()
    looks = GlmImageImageProcessorPil(
        patch_size=16,
        merge_size=1,
        temporal_patch_size=1,
        size={"shortest_edge": 32 * 32, "longest_edge": 2048 * 2048},
    )
    GlmImagePipeline(
        tokenizer=ByT5Tokenizer(extra_ids=0),
        processor=GlmImageProcessor(image_processor=looks, tokenizer=words, chat_template=_CHAT),
        text_encoder=_text_encoder(),
        vision_language_encoder=_language_model(words),
        vae=_vae(),
        transformer=_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            time_shift_type="linear",
            base_shift=BASE_SHIFT,
            max_shift=MAX_SHIFT,
            base_image_seq_len=BASE_TOKENS,
        ),
    ).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level. The codes are its first tokens, so that a token's number is its code, as in the released vocabulary."""
    codes = [f"<|dit_token_{number}|>" for number in range(_VISION)]
    bpe = byte_level_bpe(_WORDS, (*codes, *_SPECIAL))
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(json.loads(bpe.to_str()), sort_keys=True)),
        bos_token=codes[_CODES],
        eos_token=codes[_CODES + 1],
        pad_token=_SPECIAL[0],
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image|>",
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
        },
    )


def _language_model(words: PreTrainedTokenizerFast) -> GlmImageForConditionalGeneration:
    numbers = words.convert_tokens_to_ids
    config = GlmImageConfig(
        image_token_id=numbers("<|image|>"),
        image_start_token_id=_CODES,
        image_end_token_id=_CODES + 1,
        text_config={
            "vocab_size": len(words),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "vision_vocab_size": _VISION,
            "pad_token_id": numbers(_SPECIAL[0]),
            "eos_token_id": _CODES + 1,
            "initializer_range": 1.0,  # so that what it plans hangs on the words
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "intermediate_size": 16,
            "initializer_range": 0.2,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": _CODES,
            "latent_channels": 16,
            "initializer_range": 0.5,
        },
    )
    model = GlmImageForConditionalGeneration(config).eval()
    model.generation_config.do_sample = True
    # Random weights would say marks in the middle of a picture.
    model.generation_config.suppress_tokens = list(range(_CODES, _VISION))
    return model


def _text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=384,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config).eval()


def _transformer() -> GlmImageTransformer2DModel:
    model = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=_CODES,
    )
    with (
        torch.no_grad()
    ):  # so that what a token sees of others, given pictures too, is more than its own rounding
        for name, weight in model.named_parameters():
            if ".attn1." in name and weight.dim() == 2:
                weight.mul_(3.0)
    return model.eval()


def _vae() -> AutoencoderKL:
    # Means and deviations that are not 0 and 1 and differ by channel, so that a wrong normalisation is seen.
    settings: dict[str, Any] = {
        "latents_mean": [-0.3, 0.1, 0.4, -0.1],
        "latents_std": [0.6, 1.5, 0.9, 1.2],
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        **settings,
    ).eval()
