"""A random tiny Lumina-Image 2.0 as a diffusers folder: the real classes, small; it draws noise."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from whitetuner.families.lumina2.spec import SHIFT, SYSTEM
from whitetuner.families.tiny_parts import uneven

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def make(folder: Path, variant: str) -> None:
    """Writes the folder. See registry.make_tiny, which has set the seed."""
    tokenizer = _tokenizer()
    Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=_vae(),
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=_transformer(),
    ).save_pretrained(folder)


def _transformer() -> Lumina2Transformer2DModel:
    """k and v are a third as wide as q, as in the release: equal widths would hide that they were cut wrongly."""
    return uneven(
        Lumina2Transformer2DModel(
            hidden_size=36,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 64, 64),
            cap_feat_dim=16,
        )
    )


def _text_encoder(tokens: int) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=tokens,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return uneven(Gemma2Model(config))


def _tokenizer() -> GemmaTokenizer:
    """Learned on the system prompt, which so is a few tokens; every other letter is its bytes."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    letters = [*_SPECIAL, *(f"<0x{code:02X}>" for code in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=letters, show_progress=False)
    bpe.train_from_iterator([SYSTEM] * 4, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return GemmaTokenizer(vocab=learned["vocab"], merges=merges, add_bos_token=True)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
