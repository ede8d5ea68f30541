"""A random tiny FLUX.2 Klein as a diffusers folder: real classes, a few ten thousand numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from whitetuner.errors import UserError
from whitetuner.families.flux2_klein.spec import SPEC

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
_TEXT = ["a photo of a red circle on a white background", "user assistant the quick brown fox jumps over 0123456789"]


def make(folder: str, variant: str | None = None, seed: int = 0) -> None:
    """Writes the folder. Same seed, same numbers. Raises UserError for an unknown variant or a folder in use."""
    if variant is not None and variant not in SPEC.variants:
        raise UserError(
            "{title} has no variant '{variant}'",
            where="--variant",
            mend="use one of: {known}",
            title=SPEC.title,
            variant=variant,
            known=", ".join(SPEC.variants),
        )
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise UserError("{path} is not empty", where="DIR", mend="give a new or empty folder", path=target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer := _tokenizer()),
            tokenizer=tokenizer,
            transformer=_transformer(),
            is_distilled=variant == "distilled",
        )
    pipeline.save_pretrained(target)


def _tokenizer() -> Qwen2TokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(_TEXT * 4, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], additional_special_tokens=_SPECIAL[1:]
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,  # the model's own taps are 9, 18, 27
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).eval()


def _transformer() -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
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
    ).eval()
    # Statistics that are not 0 and 1, so that a forgotten normalisation is seen.
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return vae
