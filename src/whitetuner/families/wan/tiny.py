"""A random tiny WAN of any variant as a diffusers folder: the real classes made small; it draws noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModel, T5TokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from whitetuner.families.tiny_parts import uneven
from whitetuner.families.wan.spec import BOUNDARIES

_WIDTH, _TEXT, _CLIP = 24, 16, 16
_WORDS = "a an the photo of cat red ball moves to right left on green hills at sunset wall walk through town long very"


def make(folder: Path, variant: str) -> None:
    """Writes the folder. See registry.make_tiny, which has set the seed."""
    tokenizer = _tokenizer()
    parts: dict[str, Any] = {
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=5.0,
        ),
        "vae": _vae(variant),
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(len(tokenizer)),
        "transformer": _transformer(variant),
    }
    if variant in BOUNDARIES:
        parts["transformer_2"] = _transformer(variant)
        parts["boundary_ratio"] = BOUNDARIES[variant]
    if variant == "i2v-2.1":
        parts["image_encoder"] = _image_encoder()
        parts["image_processor"] = CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    if variant == "ti2v-5b":
        parts["expand_timesteps"] = True
    kind = WanImageToVideoPipeline if variant.startswith("i2v") else WanPipeline
    kind(**parts).save_pretrained(folder)
    if variant == "i2v-2.1":
        index = folder / "model_index.json"
        document = json.loads(index.read_text(encoding="utf-8"))
        document["image_processor"] = ["transformers", "CLIPImageProcessor"]  # what released folders say
        index.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _tokenizer() -> T5TokenizerFast:
    """Unigram with T5's first three pieces, single characters and a few words; anything else is <unk>."""
    letters = [chr(code) for code in range(33, 127)]
    words = sorted({f"\u2581{word}" for word in _WORDS.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [(one, -5.0) for one in letters] + [(one, -3.0) for one in words]
    return T5TokenizerFast(vocab=pieces, extra_ids=4)


def _text_encoder(vocabulary: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=_TEXT,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
    )
    return uneven(UMT5EncoderModel(config))


def _image_encoder() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=_CLIP,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=32,
        patch_size=16,
        initializer_range=0.2,
    )
    return uneven(CLIPVisionModel(config))


def _transformer(variant: str) -> WanTransformer3DModel:
    more: dict[str, Any] = {}
    if variant == "i2v-2.1":
        more = {"image_dim": _CLIP, "added_kv_proj_dim": _WIDTH}
    channels = 48 if variant == "ti2v-5b" else 16
    return uneven(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=_WIDTH // 2,
            in_channels=36 if variant.startswith("i2v") else channels,
            out_channels=channels,
            text_dim=_TEXT,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=64,
            **more,
        )
    )


def _vae(variant: str) -> AutoencoderKLWan:
    # Means and deviations that are not 0 and 1 and differ by channel, so that a wrong normalisation is seen.
    channels = 48 if variant == "ti2v-5b" else 16
    common = {
        "z_dim": channels,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.3 * ((7 * index) % 5 - 2) for index in range(channels)],
        "latents_std": [0.6 + 0.2 * ((3 * index) % 7) for index in range(channels)],
    }
    if variant != "ti2v-5b":
        return AutoencoderKLWan(base_dim=4, **common).eval()
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        **common,
    ).eval()
