"""Facts of Qwen-Image and its three Edits. No torch."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from whitetuner.errors import UserError
from whitetuner.families.files import read_config
from whitetuner.family import FamilySpec, ModelPaths, Options, Part, Setting
from whitetuner.records import Size

_HUB = "huggingface.co/Qwen/Qwen-Image (or -Edit, -Edit-2509, -Edit-2511)"
#: `_class_name` in model_index.json -> variant; 2509 and 2511 share a pipeline and differ in the denoiser's zero_cond_t.
_PIPELINES = {
    "QwenImagePipeline": "t2i",
    "QwenImageEditPipeline": "edit",
    "QwenImageEditPlusPipeline": "edit-2509",
}


class QwenImageOptions(Options):
    """[model.options] of Qwen-Image."""

    variant: Literal["auto", "t2i", "edit", "edit-2509", "edit-2511"] = Field(
        "auto", description="auto: told from the model folder; anything else is held against it"
    )
    max_sequence_length: int = Field(
        512,
        ge=16,
        le=1024,
        description="text tokens at most, template included; text to image alone: the Edits cut nothing",
    )


def held_variant(paths: ModelPaths) -> str | None:
    """Which variant the files are: the pipeline of model_index.json, and zero_cond_t, which only 2511 has set.

    None when neither tells. Raises UserError for a config.json that cannot be read and for the layered model.
    """
    config = _transformer_config(paths)
    if config.get("use_layer3d_rope") or config.get("use_additional_t_cond"):
        raise UserError(
            "this is Qwen-Image-Layered, which is not trained here",
            where=str(paths.component("transformer")),
            mend="give the folder of Qwen-Image, Qwen-Image-Edit, -Edit-2509 or -Edit-2511",
        )
    index = None if paths.folder is None else paths.folder / "model_index.json"
    pipeline = read_config(index).get("_class_name") if index is not None and index.is_file() else None
    found = _PIPELINES.get(str(pipeline))
    if found != "t2i" and config.get("zero_cond_t"):
        return "edit-2511"
    return found


def variant_of(options: QwenImageOptions, paths: ModelPaths) -> str | None:
    """The option, or else what the files say; None: cannot be told."""
    return options.variant if options.variant != "auto" else held_variant(paths)


def variant_for(task: str, options: QwenImageOptions, paths: ModelPaths) -> str:
    """The variant that this task is trained on. Raises UserError when it is for another task, or cannot be told."""
    found = variant_of(options, paths)
    if found is None and task == "t2i":
        return "t2i"
    if found is None:
        raise UserError(
            "which Qwen-Image-Edit this is cannot be told from its files",
            where="model.options.variant",
            mend="set it to edit, edit-2509 or edit-2511",
        )
    if task not in SPEC.tasks_of(found):
        raise UserError(
            "this is Qwen-Image-Edit ({variant}), which draws from given pictures, but the task is '{task}'"
            if task == "t2i"
            else "this is Qwen-Image for text to image, but the task is '{task}'",
            where="model.task",
            mend='set model.task = "edit", or give the folder of Qwen-Image'
            if task == "t2i"
            else 'set model.task = "t2i", or give the folder of Qwen-Image-Edit, -Edit-2509 or -Edit-2511',
            variant=found,
            task=task,
        )
    return found


def _advice(options: QwenImageOptions, paths: ModelPaths) -> tuple[UserError, ...]:
    held = held_variant(paths)
    if options.variant == "auto" or held is None or held == options.variant:
        return ()
    return (
        UserError(
            "model.options.variant says {said}, but the folder holds {held}",
            where=str(paths.folder or paths.component("transformer")),
            mend="leave variant out; it is told from the folder",
            said=options.variant,
            held=held,
        ),
    )


def _stride(paths: ModelPaths) -> int:
    """The VAE halves the picture once for each entry of temperal_downsample, and 2x2 of its pixels make one token."""
    vae = paths.component("vae")
    if vae.is_file():
        return 16  # a single file is the released VAE; it carries no config
    levels = read_config(vae / "config.json").get("temperal_downsample")
    if not isinstance(levels, list):
        raise UserError(
            "this config.json is not one of a Qwen-Image VAE (it has no temperal_downsample)",
            where=str(vae / "config.json"),
            mend="give the vae folder of {hub}",
            hub=_HUB,
        )
    return int(2 ** len(levels)) * 2


def _transformer_config(paths: ModelPaths) -> dict[str, Any]:
    folder = paths.component("transformer")
    return {} if folder.is_file() else read_config(folder / "config.json")


def _auto_shift(tokens: int) -> float:
    """exp(mu) of the released scheduler: mu runs from 0.5 at 256 tokens to 0.9 at 8192, by the target's tokens alone.

    256 tokens (256 px): 1.65; 1024 (512 px): 1.71; 4096 (1024 px): 2.00; 6889 (1328 px): 2.30. The stretch of its last
    step to sigma 0.02 (shift_terminal) is of the sampler, not of the noise levels that are learned.
    """
    return math.exp(0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256))


SPEC = FamilySpec(
    name="qwen-image",
    title="Qwen-Image",
    title_zh="Qwen-Image",
    tasks=("t2i", "edit"),
    variants={
        "t2i": "Qwen-Image: text to image",
        "edit": "Qwen-Image-Edit: one picture and an instruction",
        "edit-2509": "Qwen-Image-Edit-2509: one to three pictures and an instruction",
        "edit-2511": "Qwen-Image-Edit-2511: as 2509; its references are seen as free of noise (zero_cond_t)",
    },
    variant_tasks={"t2i": ("t2i",), "edit": ("edit",), "edit-2509": ("edit",), "edit-2511": ("edit",)},
    most_references={"edit": 1},
    variant_of=variant_of,
    options=QwenImageOptions,
    parts=lambda options: (
        Part(
            "transformer",
            ("transformer_blocks",),
            per_sample=(
                "hidden_states",
                "encoder_hidden_states",
                "encoder_hidden_states_mask",
                "temb",
                "joint_attention_kwargs",
                "modulate_index",
            ),
        ),
    ),
    stride_px=16,
    stride_of=_stride,
    advice=_advice,
    components=dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer", "scheduler"), _HUB),
    transformer_class="QwenImageTransformer2DModel",
    # Outside the blocks every layer is used at every token or by every block: 0.2 % of the bytes, an error everywhere.
    keep_precise=("*norm*", "img_in.*", "txt_in.*", "time_text_embed.*", "proj_out.*"),
    # Attention and feed-forward of both streams, not the modulation: musubi-tuner's scope (networks/lora_qwen_image.py
    # leaves *_mod_* out by default). The official example (diffusers train_dreambooth_lora_qwen_image.py) takes to_q,
    # to_k, to_v and to_out.0 alone. In the very last block to_add_out and txt_mlp reach no picture: their adapters
    # get no gradient and stay zero.
    adapter_targets=(
        "transformer_blocks.*.attn.to_[qkv]",
        "transformer_blocks.*.attn.to_out.0",
        "transformer_blocks.*.attn.add_[qkv]_proj",
        "transformer_blocks.*.attn.to_add_out",
        "transformer_blocks.*.img_mlp.net.0.proj",
        "transformer_blocks.*.img_mlp.net.2",
        "transformer_blocks.*.txt_mlp.net.0.proj",
        "transformer_blocks.*.txt_mlp.net.2",
    ),
    settings={
        "method.factor": Setting(
            8,
            "ai-toolkit README, LoKr example (lokr_factor: 8); every width of the blocks is a multiple of 64",
        ),
        "method.rank": Setting(
            16, "musubi-tuner docs/qwen_image.md (--network_dim 16); ai-toolkit examples too"
        ),
        "optimizer.lr": Setting(5e-5, "musubi-tuner docs/qwen_image.md; SimpleTuner for rank 16 and above"),
        "optimizer.max_grad_norm": Setting(
            1.0, "diffusers train_dreambooth_lora_qwen_image.py --max_grad_norm"
        ),
        "noise.timesteps": Setting(
            "sigmoid",
            "logit-normal (Esser et al. 2024, arXiv 2403.03206); the original page's choice for Qwen-Image T2I",
        ),
        "noise.shift": Setting(
            "auto",
            "the released scheduler's own; musubi-tuner docs/qwen_image.md: qwen_shift, 2.2 at 1328 px",
        ),
        "data.resolution": Setting(1024, "QwenImagePipeline's default size; memory falls with its square"),
    },
    default_size=Size(1024, 1024),
    auto_shift=_auto_shift,
    sample_steps=50,  # QwenImagePipeline.__call__ defaults
    sample_cfg=4.0,
    licence=dict.fromkeys(("t2i", "edit", "edit-2509", "edit-2511"), "Apache-2.0"),
    template_tokens=5,  # what stands after the caption; what stands before it is dropped
    sources=(
        "diffusers pipelines/qwenimage/pipeline_qwenimage.py, _edit.py, _edit_plus.py",
        "diffusers models/transformers/transformer_qwenimage.py",
        "diffusers models/autoencoders/autoencoder_kl_qwenimage.py",
        "Wu et al. 2025, Qwen-Image Technical Report, arXiv 2508.02324",
    ),
)
