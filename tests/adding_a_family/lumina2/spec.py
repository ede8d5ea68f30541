"""Facts of Lumina-Image 2.0. No torch."""

from __future__ import annotations

from pydantic import Field

from whitetuner.family import FamilySpec, Options, Part, Setting
from whitetuner.records import Size

HUB = "huggingface.co/Alpha-VLLM/Lumina-Image-2.0"
#: Of the released scheduler, and of ComfyUI's Lumina2: a static shift, whatever the size.
SHIFT = 6.0
#: What stands before a caption, and between the two.
SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based on "
    "textual prompts or user prompts."
)
START = " <Prompt Start> "


class Lumina2Options(Options):
    """[model.options]."""

    max_sequence_length: int = Field(
        256, ge=64, le=256, description="text tokens, system prompt included; longer captions are cut"
    )
    system_prompt: str = Field(
        SYSTEM, description="what stands before every caption; models tuned from this one have others"
    )


SPEC = FamilySpec(
    name="lumina2",
    title="Lumina-Image 2.0",
    title_zh="Lumina-Image 2.0",
    tasks=("t2i",),
    variants={"2.0": "Lumina-Image 2.0, 2.6 B parameters"},
    options=Lumina2Options,
    parts=lambda options: (
        Part(
            "transformer",
            ("context_refiner", "noise_refiner", "layers"),  # in the order in which forward runs them
            per_sample=("hidden_states", "attention_mask", "image_rotary_emb", "temb"),
        ),
    ),
    stride_px=16,  # 8 of the VAE, and 2x2 of its pixels make one token
    components=dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer", "scheduler"), HUB),
    transformer_class="Lumina2Transformer2DModel",
    # Outside the blocks every layer is used at every token, and the time by every block.
    keep_precise=("*norm*", "x_embedder.*", "time_caption_embed.*"),
    adapter_targets=("*.attn.to_[qkv]", "*.attn.to_out.0", "*.feed_forward.linear_[123]"),
    settings={
        "method.factor": Setting(8, "ai-toolkit README, LoKr example (lokr_factor: 8)"),
        "method.rank": Setting(4, "diffusers examples/dreambooth/train_dreambooth_lora_lumina2.py --rank"),
        "optimizer.lr": Setting(1e-4, "diffusers examples/dreambooth/README_lumina2.md"),
        "noise.timesteps": Setting("sigmoid", "logit-normal (Esser et al. 2024, arXiv 2403.03206)"),
        "data.resolution": Setting(1024, "Lumina2Pipeline's default size; memory falls with its square"),
    },
    default_size=Size(1024, 1024),
    auto_shift=lambda tokens: SHIFT,
    sample_steps=30,  # Lumina2Pipeline.__call__ defaults
    sample_cfg=4.0,
    licence={"2.0": "Apache-2.0 by its model card; not verified at the source"},
    comfyui_loads=False,  # keys.py says why
    tiny_options={"max_sequence_length": 128},
    template_tokens=34,  # the start mark and the system prompt, a token for each word and mark
    sources=(
        "diffusers pipelines/lumina2/pipeline_lumina2.py",
        "diffusers models/transformers/transformer_lumina2.py",
        "Qin et al. 2025, Lumina-Image 2.0, arXiv 2503.21758",
    ),
)
