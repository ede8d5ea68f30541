"""Facts of Z-Image. No torch."""

from __future__ import annotations

from whitetuner.families import z_image_facts as facts
from whitetuner.families.z_image_facts import ZImageOptions
from whitetuner.family import FamilySpec, Part
from whitetuner.records import Size

SPEC = FamilySpec(
    name="zimage",
    title="Z-Image",
    title_zh="Z-Image",
    tasks=("t2i",),
    variants=facts.VARIANTS,
    variant_of=facts.variant_of,
    options=ZImageOptions,
    parts=lambda options: (
        Part(
            "transformer",
            ("noise_refiner", "context_refiner", "layers"),
            per_sample=("x", "attn_mask", "freqs_cis", "adaln_input"),
        ),
    ),
    stride_px=16,
    stride_of=facts.stride,
    advice=facts.advice,
    components=dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer", "scheduler"), facts.HUB),
    transformer_class=facts.V1_CLASS,
    keep_precise=facts.KEEP_PRECISE,
    adapter_targets=facts.ADAPTER_TARGETS,
    settings=facts.SETTINGS,
    default_size=Size(1024, 1024),
    auto_shift=lambda tokens: facts.SHIFT,
    sample_steps=50,  # ZImagePipeline.__call__
    sample_cfg=5.0,  # guidance_scale 4 of the model card: the pipeline counts guidance from 0, cfg counts from 1
    sampling_of=facts.sampling_of,
    licence=facts.LICENCE,
    tiny_options={"max_sequence_length": 64},
    template_tokens=facts.TEMPLATE_TOKENS,
    sources=facts.SOURCES,
)
