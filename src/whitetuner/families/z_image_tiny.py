"""Random tiny parts of a Z-Image folder: the real classes, small; for the tiny models of both families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model

from whitetuner.errors import UserError
from whitetuner.families.contract import quiet
from whitetuner.families.z_image_facts import SHIFT
from whitetuner.family import FamilySpec

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
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
#: What Qwen3's template comes to for plain messages, thinking switched on or off.
_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
_WORDS = (
    "a photo of a red circle on a white background",
    "user assistant the quick brown fox jumps over 0123456789",
)


def write(
    spec: FamilySpec, kind: type, folder: str | Path, variant: str | None, seed: int, **sizes: Any
) -> None:
    """Writes the folder around a denoiser of this class; equal seeds, equal numbers.

    Raises UserError for an unknown variant or a folder in use.
    """
    variant = next(iter(spec.variants)) if variant is None else variant
    if variant not in spec.variants:
        raise UserError(
            "{title} has no variant '{variant}'",
            where="--variant",
            mend="use one of: {known}",
            title=spec.title,
            variant=variant,
            known=", ".join(spec.variants),
        )
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError("{path} is not empty", where="DIR", mend="give a new or empty folder", path=target)
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=_vae(),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=_transformer(kind, sizes),
        )
    if variant != "base":  # config.json keeps the name that a model was loaded from
        pipeline.transformer.register_to_config(_name_or_path=f"Z-Image-{variant}")
    with quiet():
        pipeline.save_pretrained(target)


def _transformer(kind: Any, sizes: dict[str, Any]) -> ZImageTransformer2DModel:
    transformer = kind(**SIZES, **sizes)
    for name, weight in transformer.named_parameters():
        if "norm" in name and weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)  # all ones would hide norms that were exchanged
        elif name.endswith("pad_token"):
            torch.nn.init.normal_(weight)  # zeros would hide that they are forgotten
    return transformer.eval()


def _tokenizer() -> Qwen2TokenizerFast:
    """Byte-level, so that every caption in every script has tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(_SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(_WORDS * 4, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        extra_special_tokens=list(_SPECIAL_TOKENS[1:]),
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


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
