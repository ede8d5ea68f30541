"""Facts of FLUX.2 Klein. No torch."""

from __future__ import annotations

import math

from pydantic import Field

from whitetuner.family import FamilySpec, Options, Part, Setting
from whitetuner.records import Size


class KleinOptions(Options):
    """[model.options] of FLUX.2 Klein."""

    variant: str = Field("base", pattern="^(base|distilled)$", description="base, or distilled (4 steps; not made for training)")
    max_sequence_length: int = Field(512, ge=16, le=512, description="text tokens, padding included")
    text_encoder_out_layers: tuple[int, ...] = Field((9, 18, 27), description="layers of Qwen3 that the text is taken from")


def _parts(options: Options) -> tuple[Part, ...]:
    return (Part("transformer", ("transformer_blocks", "single_transformer_blocks")),)


def _auto_shift(size: Size) -> float:
    """exp(mu) of the model's own sampling schedule at 50 steps (diffusers `compute_empirical_mu`)."""
    tokens, steps = size.width * size.height // 256, 50
    if tokens > 4300:
        return math.exp(0.00016927 * tokens + 0.45666666)
    high, low = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    slope = (high - low) / 190.0
    return math.exp(slope * steps + high - 200.0 * slope)


SPEC = FamilySpec(
    name="flux2-klein",
    title="FLUX.2 Klein",
    title_zh="FLUX.2 Klein",
    tasks=("t2i",),
    variants={
        "base": "FLUX.2-klein-base-4B or -9B: the one to train on",
        "distilled": "FLUX.2-klein-4B or -9B: draws in 4 steps; training it is warned about",
    },
    options=KleinOptions,
    parts=_parts,
    stride_px=16,
    components={
        "transformer": "black-forest-labs/FLUX.2-klein-base-4B",
        "vae": "black-forest-labs/FLUX.2-klein-base-4B",
        "text_encoder": "black-forest-labs/FLUX.2-klein-base-4B",
        "tokenizer": "black-forest-labs/FLUX.2-klein-base-4B",
        "scheduler": "black-forest-labs/FLUX.2-klein-base-4B",
    },
    transformer_class="Flux2Transformer2DModel",
    # Modulation is shared by all blocks and x_embedder / proj_out touch every pixel: an error there is seen everywhere.
    keep_precise=("*norm*", "*modulation*", "x_embedder*", "context_embedder*", "time_guidance_embed*", "proj_out*"),
    # Block linears: every program loads these (ComfyUI's lycoris_ names cover the blocks alone, diffusers' decoder too).
    adapter_targets=("transformer_blocks.*", "single_transformer_blocks.*"),
    settings={
        "method.factor": Setting(8, "factor^2 must not exceed a layer's width for diffusers to load it; 2, 4, 8, 16 do"),
        "method.rank": Setting(16, "diffusers examples/dreambooth train_dreambooth_lora_flux2_klein.py uses small ranks"),
        "optimizer.lr": Setting(1e-4, "diffusers examples/dreambooth train_dreambooth_lora_flux2_klein.py (--learning_rate)"),
        "noise.timesteps": Setting("sigmoid", "logit-normal, as in Esser et al. 2024 (arXiv 2403.03206) and diffusers' example"),
        "data.resolution": Setting(1024, "the size the model was made for"),
    },
    default_size=Size(1024, 1024),
    tokens=lambda size: size.width * size.height // 256,
    auto_shift=_auto_shift,
    sample_steps=50,
    sample_cfg=4.0,
    licence={"4B": "Apache-2.0", "9B": "FLUX non-commercial"},
    sources=("diffusers pipelines/flux2/pipeline_flux2_klein.py", "diffusers models/transformers/transformer_flux2.py"),
)
