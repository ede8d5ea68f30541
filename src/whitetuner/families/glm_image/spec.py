"""Facts of GLM-Image, text to image and edit: one model does both. No torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from whitetuner.errors import UserError
from whitetuner.families.files import read_config
from whitetuner.family import FamilySpec, ModelPaths, Options, Part, Setting
from whitetuner.records import Size

_HUB = "huggingface.co/zai-org/GLM-Image"
#: The released scheduler's: base_shift, max_shift and base_image_seq_len of scheduler_config.json.
BASE_SHIFT, MAX_SHIFT, BASE_TOKENS = 0.25, 0.75, 256


class GlmImageOptions(Options):
    """[model.options] of GLM-Image."""

    max_sequence_length: int = Field(
        2048, ge=16, le=2048, description="bytes of each quoted text at most, as the pipeline counts them"
    )
    generated_prior: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="share of the visits that learn beside prior tokens that the language model made of the caption; the "
        "others learn beside those of the picture itself",
    )
    reference_gradients: bool = Field(
        False,
        description="edit: gradients flow through the given pictures' keys and values too (more memory, slower)",
    )


def _stride(paths: ModelPaths) -> int:
    """The VAE halves the picture once for each level after the first, and 4x4 of its pixels make one prior token."""
    vae = paths.component("vae")
    if vae.is_file():
        return 32  # a single file is the released VAE; it carries no config
    levels = read_config(vae / "config.json").get("block_out_channels")
    if not isinstance(levels, list):
        raise UserError(
            "this config.json is not one of GLM-Image's VAE (it has no block_out_channels)",
            where=str(vae / "config.json"),
            mend="give the vae folder of {hub}",
            hub=_HUB,
        )
    return int(2 ** (len(levels) - 1)) * 4


def language_model(paths: ModelPaths) -> Path:
    """Its folder. Raises UserError, saying what to get, when the model folder is without it."""
    folder = paths.folder
    if folder is not None and not (folder / "vision_language_encoder").is_dir():
        raise UserError(
            "the folder lacks GLM-Image's language model (vision_language_encoder), which plans every picture",
            where=str(folder),
            mend="download the folders vision_language_encoder and processor of huggingface.co/zai-org/GLM-Image too "
            "(about 20 GB); it is used while caching alone and need not fit on the card",
        )
    return paths.component("vision_language_encoder")


def _needed(options: GlmImageOptions, paths: ModelPaths) -> tuple[str, ...]:
    """All components; that the language model is missing is told first, and what to get."""
    if paths.folder is not None:
        language_model(paths)
    return tuple(SPEC.components)


def quote_fault(caption: str) -> UserError | None:
    """A quote that is opened and not closed: what follows would not be drawn as text. None: there is none.

    Straight single ones are apostrophes too often to be counted.
    """
    for first, last in (('"', '"'), ("\u201c", "\u201d"), ("\u300c", "\u300d")):
        opened, closed = caption.count(first), caption.count(last)
        if opened % 2 if first == last else opened != closed:
            return UserError(
                "a {first} in this caption has no counterpart: GLM-Image draws what stands in quotes as text",
                where=repr(caption[:200]),
                mend="write {first}...{last} around the words that the picture shows, or take the single {first} out",
                first=first,
                last=last,
            )
    return None


def auto_shift(tokens: int) -> float:
    """mu of the released scheduler, s of sigma = s u / (1 + (s - 1) u): by the root of the target's tokens (16 px each).

    tokens: as the denoiser sees them. 1024 (512 px): 1.75; 4096 (1024 px): 3.25; 16384 (2048 px): 6.25.
    """
    return BASE_SHIFT + MAX_SHIFT * (tokens / BASE_TOKENS) ** 0.5


SPEC = FamilySpec(
    name="glm-image",
    title="GLM-Image",
    title_zh="GLM-Image",
    tasks=("t2i", "edit"),
    variants={
        "t2i": "GLM-Image: text to image",
        "edit": "GLM-Image: an instruction and one or more given pictures; the same model",
    },
    variant_tasks={"t2i": ("t2i",), "edit": ("edit",)},
    options=GlmImageOptions,
    parts=lambda options: (
        Part(
            "transformer",
            ("transformer_blocks",),
            per_sample=("hidden_states", "encoder_hidden_states", "temb", "attention_mask", "kv_cache"),
        ),
    ),
    stride_px=32,
    stride_of=_stride,
    tokens=lambda size, stride: 4 * (size.width // stride) * (size.height // stride),
    components=dict.fromkeys(
        (
            "transformer",
            "vae",
            "text_encoder",
            "tokenizer",
            "vision_language_encoder",
            "processor",
            "scheduler",
        ),
        _HUB,
    ),
    needed=_needed,
    transformer_class="GlmImageTransformer2DModel",
    # Outside the blocks every layer is used at every token or by every block: 2 % of the bytes, an error everywhere.
    keep_precise=(
        "image_projector.*",
        "glyph_projector.*",
        "prior_projector.*",
        "time_condition_embed.*",
        "norm_out.*",
        "proj_out.*",
    ),
    # Attention and feed-forward, which text and picture share; not the modulation (norm1.linear), as for the other
    # families. No published trainer of this model names targets.
    adapter_targets=(
        "transformer_blocks.*.attn1.to_[qkv]",
        "transformer_blocks.*.attn1.to_out.0",
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
    ),
    settings={
        "method.factor": Setting(
            8,
            "ai-toolkit README, LoKr example (lokr_factor: 8); every width of the blocks is a multiple of 64",
        ),
        "method.rank": Setting(
            16, "as for Qwen-Image (musubi-tuner docs/qwen_image.md); none is published for it"
        ),
        "optimizer.lr": Setting(
            5e-5, "as for Qwen-Image (musubi-tuner, SimpleTuner); none is published for it"
        ),
        "optimizer.max_grad_norm": Setting(1.0, "diffusers train_dreambooth_lora_*.py --max_grad_norm"),
        "noise.timesteps": Setting("sigmoid", "logit-normal (Esser et al. 2024, arXiv 2403.03206)"),
        "noise.shift": Setting(
            "auto", "the released scheduler's own: 3.25 at 1024 px (pipeline_glm_image.py)"
        ),
        "data.resolution": Setting(1024, "GlmImagePipeline's default size; memory falls with its square"),
    },
    default_size=Size(1024, 1024),
    auto_shift=auto_shift,
    caption_fault=quote_fault,
    comfyui_loads=False,
    tiny_options={"max_sequence_length": 64},
    sample_steps=50,  # GlmImagePipeline.__call__ defaults
    sample_cfg=1.5,
    # By copies of its model card; the publisher's repository on GitHub names none.
    licence=dict.fromkeys(
        ("t2i", "edit"), "MIT, its picture tokenizer (of X-Omni) Apache-2.0; not verified at the source"
    ),
    sources=(
        "diffusers pipelines/glm_image/pipeline_glm_image.py",
        "diffusers models/transformers/transformer_glm_image.py",
        "transformers models/glm_image (modeling_glm_image.py, processing_glm_image.py)",
    ),
)
