"""A random tiny FLUX.2 Klein as a diffusers folder: the real classes with 150,000 numbers; it draws noise."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from whitetuner.errors import UserError
from whitetuner.families.contract import quiet
from whitetuner.families.flux2_klein.spec import SPEC

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


def make(folder: str | Path, variant: str | None = None, seed: int = 0) -> None:
    """Writes the folder; equal seeds, equal numbers. Raises UserError for an unknown variant or a folder in
    use.
    """
    variant = next(iter(SPEC.variants)) if variant is None else variant
    if variant not in SPEC.variants:
        raise UserError(
            "{title} has no variant '{variant}'",
            where="--variant",
            mend="use one of: {known}",
            title=SPEC.title,
            variant=variant,
            known=", ".join(SPEC.variants),
        )
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError("{path} is not empty", where="DIR", mend="give a new or empty folder", path=target)
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=_transformer(double_blocks=2 if variant == "base-9b" else 1),
            is_distilled=variant == "distilled",
        )
    with quiet():
        pipeline.save_pretrained(target)


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


def _text_encoder(tokens: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=tokens,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=30,  # more than the 27 that are read, as the real one has
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).eval()


def _transformer(double_blocks: int) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double_blocks,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    for name, weight in transformer.named_parameters():
        if "norm" in name and weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)  # all ones would hide norms that were exchanged
    return transformer.eval()


def _vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=32,
    )
    # Not 0 and 1, so that a forgotten normalisation is seen.
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()
