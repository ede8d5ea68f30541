"""Facts that Z-Image and Z-Image V2 share. No torch.

V2 has another denoiser and everything else of Z-Image: text, latents, clock, sign, schedule, settings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from whitetuner.errors import UserError
from whitetuner.families.files import read_config
from whitetuner.family import ModelPaths, Options, Setting
from whitetuner.paths import PathText

HUB = "huggingface.co/Tongyi-MAI/Z-Image"
ADAPTER_HUB = "huggingface.co/ostris/zimage_turbo_training_adapter"
V1_CLASS = "ZImageTransformer2DModel"

VARIANTS = {
    "base": "Z-Image: train on this one",
    "turbo": "Z-Image-Turbo: draws in 8 steps without guidance; merge the de-distill adapter before training it",
    "de-turbo": "Z-Image-De-Turbo: Turbo with its distillation undone; trained and drawn like the base",
}

#: Outside the blocks every layer is used at every token, and the time by every block: little to gain in bytes, an error
#: everywhere to lose. The pad tokens are no linear layers at all.
KEEP_PRECISE = (
    "*norm*",
    "*pad_token",
    "all_x_embedder.*",
    "cap_embedder.*",
    "t_embedder.*",
    "all_final_layer.*",
)

#: Attention and feed-forward of every block, refiners included: the layers of DiffSynth-Studio's Z-Image training. Each has
#: a name in ComfyUI, where q, k and v are rows of one matrix.
ADAPTER_TARGETS = ("*.attention.to_[qkv]", "*.attention.to_out.0", "*.feed_forward.w[123]")

SETTINGS = {
    "method.factor": Setting(8, "ai-toolkit README, LoKr example (lokr_factor: 8)"),
    "method.rank": Setting(
        16, "SimpleTuner quickstart ZIMAGE.md (16); DiffSynth-Studio and musubi-tuner take 32"
    ),
    "optimizer.lr": Setting(1e-4, "musubi-tuner docs/zimage.md and DiffSynth-Studio's Z-Image examples"),
    "optimizer.max_grad_norm": Setting(1.0, "diffusers train_dreambooth_lora_z_image.py --max_grad_norm"),
    "noise.timesteps": Setting(
        "sigmoid", "logit-normal (Esser et al. 2024, arXiv 2403.03206); the original page's choice"
    ),
    "data.resolution": Setting(1024, "ZImagePipeline's default size; memory falls with its square"),
}

#: Of the released Turbo's scheduler_config.json: a static shift, whatever the size.
SHIFT = 3.0
#: <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n
TEMPLATE_TOKENS = 8
#: The publisher's repository on GitHub names none; the model cards of base and Turbo are tagged so, by others' lists of them.
LICENCE = dict.fromkeys(VARIANTS, "Apache-2.0 by its model card; not verified at the source")
SOURCES = (
    "diffusers pipelines/z_image/pipeline_z_image.py",
    "diffusers models/transformers/transformer_z_image.py",
    "huggingface.co/Tongyi-MAI/Z-Image-Turbo",
)


class ZImageOptions(Options):
    """[model.options] of Z-Image and of Z-Image V2."""

    variant: Literal["auto", "base", "turbo", "de-turbo"] = Field(
        "auto", description="auto: told from the model folder's name (the files of the three are alike)"
    )
    max_sequence_length: int = Field(
        512, ge=16, le=512, description="text tokens, template included; longer captions are cut"
    )
    merge_adapter: PathText | None = Field(
        None,
        description="a LoRA file (safetensors) that is added to the frozen weights before training, and left out again "
        "when pictures are drawn: the de-distill adapter of Z-Image-Turbo",
    )


def variant_of(options: ZImageOptions, paths: ModelPaths) -> str | None:
    """Which release a folder holds: as the options say, else by the folder's name or the name that config.json keeps of
    it. Their files are alike otherwise. None: cannot be told.
    """
    if options.variant != "auto":
        return options.variant
    folders = _folders(paths)
    names = [part for folder in folders for part in folder.absolute().parts[-4:]]
    for kept in (folder / "config.json" for folder in folders[-1:]):
        if not kept.is_file():
            continue
        names += re.split(r"[/\\]", str(read_config(kept).get("_name_or_path", "")))[-4:]
    words = [name.lower() for name in names if re.search(r"z[-_ ]?image", name, re.IGNORECASE)]
    if any(re.search(r"de[-_ ]?turbo", word) for word in words):
        return "de-turbo"
    if any("turbo" in word for word in words):
        return "turbo"
    return "base" if words else None


def is_turbo(options: ZImageOptions, paths: ModelPaths) -> bool:
    """Whether the model draws in a few steps, without guidance."""
    return variant_of(options, paths) == "turbo"


def sampling_of(options: ZImageOptions, paths: ModelPaths) -> tuple[int, float] | None:
    """Turbo: 8 steps, no guidance (its model card)."""
    return (8, 1.0) if is_turbo(options, paths) else None


def advice(options: ZImageOptions, paths: ModelPaths) -> tuple[UserError, ...]:
    """FamilySpec.advice of both families."""
    turbo = is_turbo(options, paths)
    if turbo and options.merge_adapter is None:
        return (
            UserError(
                "this is Z-Image-Turbo: plain training undoes its distillation, and pictures blur at 8 steps",
                where=str(paths.folder or "model.options.variant"),
                mend="train on Z-Image, or set model.options.merge_adapter to the de-distill adapter ({hub})",
                hub=ADAPTER_HUB,
            ),
        )
    if not turbo and options.merge_adapter is not None:
        return (
            UserError(
                "an adapter is merged into a model that is not known to be Z-Image-Turbo",
                where="model.options.merge_adapter",
                mend='leave it out; if this is Turbo in a folder of another name, set model.options.variant = "turbo"',
            ),
        )
    return ()


def stride(paths: ModelPaths) -> int:
    """The VAE halves the picture between its levels, and 2x2 of its pixels make one token: 16 for four levels."""
    vae = paths.component("vae")
    if vae.is_file():
        return 16  # a single file is the released VAE; it carries no config
    levels = read_config(vae / "config.json").get("block_out_channels", ())
    if not levels:
        raise UserError(
            "this config.json is not one of a Z-Image VAE (it has no block_out_channels)",
            where=str(vae / "config.json"),
            mend="give the vae folder of {hub}",
            hub=HUB,
        )
    return int(2 ** len(levels))


def _folders(paths: ModelPaths) -> list[Path]:
    """The model folder and the denoiser's, as far as they are given."""
    transformer = paths.single.get("transformer")
    if paths.folder is None:
        return [] if transformer is None else [transformer]
    return [paths.folder, transformer or paths.folder / "transformer"]
