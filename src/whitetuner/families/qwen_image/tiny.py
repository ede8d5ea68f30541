"""A random tiny Qwen-Image, or one of its Edits, as a diffusers folder: the real classes made small; it draws noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from whitetuner.families.qwen_image.encoders import SYSTEM
from whitetuner.families.qwen_image.reference import PictureProcessor
from whitetuner.families.tiny_parts import byte_level_bpe, qwen2_tokenizer, uneven

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_WORDS = (
    "a photo of a red circle on a white background",
    "Picture 1: make it blue",
    "system\nuser\nassistant\n",
)


def make(folder: Path, variant: str) -> None:
    """Writes the folder. See registry.make_tiny, which has set the seed."""
    tokenizer = _tokenizer()
    parts: dict[str, Any] = {
        # Not shift_terminal = 0.02, as released: one step, which tests take, would be no number there.
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
        ),
        "vae": _vae(),
        "text_encoder": _text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "transformer": _transformer(zero_cond_t=variant == "edit-2511"),
    }
    if variant == "t2i":
        pipeline: Any = QwenImagePipeline(**parts)
    else:
        looks = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=84 * 84)
        parts["processor"] = PictureProcessor(looks, tokenizer)
        pipeline = (QwenImageEditPipeline if variant == "edit" else QwenImageEditPlusPipeline)(**parts)
    pipeline.save_pretrained(folder)
    if variant != "t2i":
        index = folder / "model_index.json"
        document = json.loads(index.read_text(encoding="utf-8"))
        document["processor"] = ["transformers", "Qwen2VLProcessor"]  # what released folders say
        index.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _tokenizer() -> Qwen2TokenizerFast:
    """Byte-level, so that every caption in every script has tokens.

    It has learned the official templates by heart: each of their words is one token, as for Qwen's own tokenizer, so that
    the system's part is as long (34 and 64 tokens) and what is dropped of the text ends where the user's words begin.
    """
    splitting = Qwen2TokenizerFast(vocab={"a": 0}, merges=[]).backend_tokenizer.pre_tokenizer
    words = (*(system for system, _ in SYSTEM.values()), *_WORDS)
    bpe = byte_level_bpe(
        words, _SPECIAL_TOKENS, size=900, pre_tokenizer=splitting
    )  # more than there is to learn
    return qwen2_tokenizer(bpe, _SPECIAL_TOKENS)


def _text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "initializer_range": 0.2,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        **ids,
    )
    return uneven(Qwen2_5_VLForConditionalGeneration(config))


def _transformer(zero_cond_t: bool) -> QwenImageTransformer2DModel:
    return uneven(
        QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        )
    )


def _vae() -> AutoencoderKLQwenImage:
    # Means and deviations that are not 0 and 1 and differ by channel, so that a wrong normalisation is seen.
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.3, 0.1, 0.4, -0.1],
        latents_std=[0.6, 1.5, 0.9, 1.2],
    ).eval()
