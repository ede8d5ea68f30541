"""Facts of FLUX.2 Klein. No torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from whitetuner.errors import UserError
from whitetuner.families.files import read_config
from whitetuner.family import FamilySpec, ModelPaths, Options, Part, Setting
from whitetuner.records import Size

#: num_attention_heads of the released transformers tells which one a folder holds (their config.json).
_HEADS = {24: "base-4b", 32: "base-9b"}
_HUB = "huggingface.co/black-forest-labs/FLUX.2-klein-base-4B (or -9B)"


class KleinOptions(Options):
    """[model.options] of FLUX.2 Klein."""

    variant: Literal["auto", "base-4b", "base-9b", "distilled"] = Field(
        "auto", description="auto: told from the model folder; anything else is held against it"
    )
    max_sequence_length: int = Field(
        512,
        ge=16,
        le=512,
        description="text tokens, padding included; the model attends to padding, so train at what you sample at",
    )
    text_encoder_out_layers: tuple[int, ...] = Field(
        (9, 18, 27),
        min_length=1,
        description="layers of Qwen3 whose hidden states are the text, side by side",
    )


def is_distilled(options: KleinOptions, paths: ModelPaths) -> bool:
    """Whether the model draws in a few steps without guidance: model_index.json says so."""
    if options.variant == "distilled" or paths.folder is None:
        return options.variant == "distilled"
    index = paths.folder / "model_index.json"
    return index.is_file() and bool(read_config(index).get("is_distilled", False))


def _variant(options: KleinOptions, paths: ModelPaths) -> str | None:
    """Which one the folder holds: by model_index.json and the number of heads."""
    return "distilled" if is_distilled(options, paths) else _size_of(paths)


def _size_of(paths: ModelPaths) -> str | None:
    transformer = paths.component("transformer")
    heads = (
        None if transformer.is_file() else read_config(transformer / "config.json").get("num_attention_heads")
    )
    return _HEADS.get(heads) if isinstance(heads, int) else None


def _stride(paths: ModelPaths) -> int:
    """The VAE halves the picture between its levels, and 2x2 of its pixels make one token: 16 for four
    levels.
    """
    vae = paths.component("vae")
    if vae.is_file():
        return 16  # a single file is the released VAE; it carries no config
    levels = read_config(vae / "config.json").get("block_out_channels", ())
    if not levels:
        raise UserError(
            "this config.json is not one of a FLUX.2 VAE (it has no block_out_channels)",
            where=str(vae / "config.json"),
            mend="give the vae folder of {hub}",
            hub=_HUB,
        )
    return int(2 ** len(levels))


def _advice(options: KleinOptions, paths: ModelPaths) -> tuple[UserError, ...]:
    found: list[UserError] = []
    if is_distilled(options, paths):
        found.append(
            UserError(
                "this is the distilled FLUX.2 Klein: training undoes its distillation, and pictures turn grey or blurred",
                where=str(paths.folder or "model.options.variant"),
                mend="train on FLUX.2-klein-base-4B or -9B",
            )
        )
    held = _size_of(paths)
    if held is not None and options.variant in _HEADS.values() and options.variant != held:
        found.append(
            UserError(
                "model.options.variant says {said}, but the folder holds {held}",
                where=str(paths.component("transformer")),
                mend="leave variant out; it is told from the folder",
                said=options.variant,
                held=held,
            )
        )
    return tuple(found)


def _auto_shift(tokens: int) -> float:
    """exp(mu) of the model's own schedule at 50 steps: diffusers `compute_empirical_mu`, dynamic exponential
    shift.

    256 tokens (256 px): 5.1; 1024 (512 px): 5.5; 4096 (1024 px): 7.6; above 4300 tokens the schedule has a
    jump down.
    """
    at_200_steps = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return math.exp(at_200_steps)
    at_10_steps = 8.73809524e-05 * tokens + 1.89833333
    return math.exp(at_200_steps + (at_10_steps - at_200_steps) * (200 - 50) / 190)


SPEC = FamilySpec(
    name="flux2-klein",
    title="FLUX.2 Klein",
    title_zh="FLUX.2 Klein",
    tasks=("t2i", "edit"),
    variants={
        "base-4b": "FLUX.2-klein-base-4B: train on this one; fits small cards",
        "base-9b": "FLUX.2-klein-base-9B: the larger one",
        "distilled": "FLUX.2-klein-4B or -9B: draws in 4 steps, not made to be trained (you are warned)",
    },
    options=KleinOptions,
    parts=lambda options: (
        Part(
            "transformer",
            ("transformer_blocks", "single_transformer_blocks"),
            per_sample=(
                "hidden_states",
                "encoder_hidden_states",
                "temb_mod",
                "temb_mod_img",
                "temb_mod_txt",
                "joint_attention_kwargs",
            ),
        ),
    ),
    stride_px=16,
    stride_of=_stride,
    variant_of=_variant,
    advice=_advice,
    components=dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer", "scheduler"), _HUB),
    transformer_class="Flux2Transformer2DModel",
    # Outside the blocks every layer is used at every token or by every block (the modulation is shared):
    # little to gain in bytes (5 % of the 4B), an error everywhere to lose.
    keep_precise=(
        "*norm*",
        "x_embedder.*",
        "context_embedder.*",
        "time_guidance_embed.*",
        "*_modulation*",
        "proj_out.*",
    ),
    # All linears of the blocks (12 a double block, 2 a single one, where q, k, v and the MLP are one layer)
    # and nothing
    # else: one file of these, in lycoris_ names, loads in ComfyUI, in diffusers and in lycoris-lora, while
    # diffusers' decoder of such names knows no others. lycoris-lora's and the original trainer's scope is the
    # same. The official example (diffusers train_dreambooth_lora_flux2_klein.py) takes the attention only and
    # 24 single blocks, of which the 4B has 20.
    adapter_targets=(
        "transformer_blocks.*.attn.to_[qkv]",
        "transformer_blocks.*.attn.to_out.0",
        "transformer_blocks.*.attn.add_[qkv]_proj",
        "transformer_blocks.*.attn.to_add_out",
        "transformer_blocks.*.ff.linear_*",
        "transformer_blocks.*.ff_context.linear_*",
        "single_transformer_blocks.*.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.*.attn.to_out",
    ),
    settings={
        "method.factor": Setting(
            8,
            "ai-toolkit README, LoKr example (lokr_factor: 8); diffusers can load 2, 4, 8, 16 and 32 on every block",
        ),
        "method.rank": Setting(
            16, "SimpleTuner quickstart FLUX2.md (16); ai-toolkit and musubi-tuner take 32"
        ),
        "optimizer.lr": Setting(
            1e-4,
            "diffusers train_dreambooth_lora_flux2_klein.py --learning_rate; musubi-tuner docs/flux_2.md too",
        ),
        "optimizer.max_grad_norm": Setting(
            1.0, "diffusers train_dreambooth_lora_flux2_klein.py --max_grad_norm"
        ),
        "noise.timesteps": Setting(
            "sigmoid",
            "logit-normal (Esser et al. 2024, arXiv 2403.03206); the original page's choice for Klein T2I",
        ),
        "data.resolution": Setting(1024, "Flux2KleinPipeline's default size; memory falls with its square"),
    },
    default_size=Size(1024, 1024),
    auto_shift=_auto_shift,
    sample_steps=50,  # Flux2KleinPipeline.__call__ defaults, for the base models
    sample_cfg=4.0,
    licence={
        "base-4b": "Apache-2.0",
        "base-9b": "FLUX Non-Commercial License",
        "distilled": "as its base: 4B Apache-2.0, 9B FLUX Non-Commercial License",
    },
    tiny_options={"max_sequence_length": 64},
    template_tokens=12,
    sources=(
        "diffusers pipelines/flux2/pipeline_flux2_klein.py",
        "diffusers models/transformers/transformer_flux2.py",
        "diffusers models/autoencoders/autoencoder_kl_flux2.py",
        "bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence",
    ),
)
