"""Every word on the forms, in both languages: labels and help of the options, choices, sections, and the page's own texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from whitetuner.config.told import field_of
from whitetuner.families import registry
from whitetuner.gui import words_zh
from whitetuner.gui.document import number_text, without_rows

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

LANGUAGES = ("zh", "en")

#: English labels that the option's name does not give by itself.
_LABELS = {
    "run.name": "Name of the run",
    "run.output_dir": "Output folder",
    "run.resume": "Go on from",
    "model.path": "Model",
    "model.transformer_2": "Second transformer",
    "model.vae": "VAE",
    "data.images": "Picture folder",
    "data.target": "Target folder",
    "data.conditions": "Condition folders",
    "data.prompt": "One prompt for all",
    "data.videos": "Video folder",
    "data.caption_ext": "Caption file ending",
    "data.caption_shuffles": "Shuffled orders of tags",
    "data.caption_keep": "Tags that stay first",
    "data.trigger": "Trigger word",
    "data.recursive": "Sub-folders too",
    "data.upscale": "Enlarge small pictures",
    "data.too_small": "Pictures that are too small",
    "data.num_frames": "Frames",
    "data.fps": "Frames per second",
    "data.clips": "Clips of a video",
    "data.too_short": "Videos that are too short",
    "data.frames_fps": "Rate of frame folders",
    "data.mask_dir": "Mask folder",
    "data.mask_alpha": "Mask from transparency",
    "data.mask_floor": "Weight outside of the mask",
    "data.cache_dir": "Cache folder",
    "data.workers": "Decoding threads",
    "data.sets": "Several data sets",
    "method.kind": "Method",
    "method.factor": "LoKr factor",
    "method.full_matrix": "Full second factor",
    "method.targets": "Layers that learn",
    "method.init_from": "Begin from an adapter",
    "method.precision": "Precision of the weights (full)",
    "optimizer.clip": "Clipping (full)",
    "noise.timesteps": "Timestep sampling",
    "noise.lognorm_alpha": "Log-normal share",
    "optimizer.name": "Optimizer",
    "optimizer.lr": "Learning rate",
    "optimizer.eps": "eps",
    "optimizer.betas": "betas",
    "optimizer.ema": "EMA decay",
    "optimizer.args": "More arguments",
    "optimizer.lora_plus": "LoRA+ ratio",
    "optimizer.min_lr_ratio": "Lowest learning rate (share)",
    "memory.vram_gb": "Card memory (GB)",
    "memory.base": "Format of the base model",
    "memory.blocks_to_swap": "Blocks to swap",
    "memory.dtype": "Precision",
    "memory.shard": "Share weights among GPUs",
    "memory.compile": "torch.compile",
    "save.every": "Checkpoint every",
    "save.keep": "Checkpoints to keep",
    "save.dtype": "Precision of the final file",
    "preview.every": "Preview every",
    "preview.at_start": "Preview before training",
    "preview.max_seconds": "Time for a preview (s)",
    "preview.prompts": "Preview prompts",
    "preview.prompts.text": "Prompt",
    "preview.prompts.negative": "Negative prompt",
    "preview.prompts.cfg": "Guidance (CFG)",
    "preview.prompts.images": "Given pictures",
    "validation.every": "Validate every",
    "validation.share": "Share held out",
    "validation.items": "Pictures",
    "validation.sigmas": "Noise levels per picture",
    "log.tensorboard": "TensorBoard",
    "log.wandb": "wandb",
    "log.swanlab": "SwanLab",
    "log.project": "Project (wandb, SwanLab)",
    "log.console_every": "Console line every",
}
_CHOICES = {
    ("model.task", "t2i"): "text to image",
    ("model.task", "edit"): "edit",
    ("model.task", "i2v"): "image to video",
    ("model.task", "t2v"): "text to video",
    ("method.kind", "lokr"): "little memory, recommended",
    ("method.kind", "lora"): "the usual one",
    ("method.kind", "full"): "the whole model, much memory",
    ("method.precision", "bf16_stochastic"): "bf16, rounded at random: nothing more in memory",
    ("method.precision", "kahan"): "bf16 and the rest of the sum: 2 bytes more a weight",
    ("method.precision", "fp32_master"): "bf16 and the rest of an fp32 weight: 2 bytes more",
    ("method.precision", "fp32"): "float32 all through: twice the memory, slow",
    ("optimizer.clip", "previous"): "by the whole gradient of the step before",
    ("optimizer.clip", "block"): "each block by its own",
    ("noise.timesteps", "linear"): "uniform, general",
    ("noise.timesteps", "sigmoid"): "around the middle: detail, texture, style",
    ("noise.timesteps", "weighted"): "weight on the middle: distilled models",
    ("noise.timesteps", "shift"): "towards much noise: learns composition fast",
    ("noise.timesteps", "lognorm_blend"): "log-normal blend: little noise, detail",
    ("memory.base", "bf16"): "16 bit, most precise",
    ("memory.base", "fp8"): "8 bit float",
    ("memory.base", "int8"): "8 bit integer",
    ("memory.base", "nf4"): "4 bit, smallest",
    ("memory.base", "qint8"): "same as int8",
    ("memory.base", "qfloat8"): "same as fp8",
    ("memory.gradient_checkpointing", "true"): "on",
    ("memory.gradient_checkpointing", "false"): "off",
    ("save.dtype", "bf16"): "half the size",
}
_SECTIONS = {
    "run": "Run",
    "model": "Model",
    "model.options": "The model's own options",
    "data": "Data",
    "method": "Method",
    "noise": "Timesteps and noise",
    "optimizer": "Optimizer",
    "memory": "Memory",
    "save": "Saving",
    "preview": "Previews",
    "validation": "Validation",
    "log": "Log",
}


def label(key: str, language: str, family: str = "") -> str:
    """What stands above a control."""
    if language == "zh":
        found = chinese(key, family)
        return found[0] if found else key
    plain = _shared(key)
    words = plain.rpartition(".")[2].replace("_", " ")
    return _LABELS.get(plain, words[:1].upper() + words[1:])


def help_text(key: str, language: str, family: str = "") -> str:
    """One line: what an option does."""
    if language == "zh":
        found = chinese(key, family)
        return found[1] if found else ""
    return english(key, family)


def english(key: str, family: str = "") -> str:
    """The schema's own description."""
    plain = without_rows(key)
    if plain.startswith("model.options.") and family:
        about = registry.spec(family).options.model_fields.get(plain.removeprefix("model.options."))
    else:
        about = field_of(plain)
    return (about.description or "") if about is not None else ""


def chinese(key: str, family: str = "") -> tuple[str, str] | None:
    """(label, help); None when it is missing, which a test forbids."""
    plain = _shared(key)
    own = f"{family}:{plain.removeprefix('model.options.')}" if plain.startswith("model.options.") else ""
    if (
        own
        and family
        and (found := family_words(family).get("options", {}).get(own.partition(":")[2])) is not None
    ):
        return found[0], found[1]
    return words_zh.FIELDS.get(own) or words_zh.FIELDS.get(plain)


@cache
def family_words(family: str) -> Mapping[str, Mapping[str, Any]]:
    """What a family's folder says in Chinese of its own (words_zh.toml); empty without that file.

    "errors": English template -> Chinese; "options": its name in [model.options] -> [label, help]
    """
    file = resources.files(registry.FAMILIES[family]).joinpath("words_zh.toml")
    return tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def choice(key: str, value: Any, language: str) -> str:
    """A choice as it is shown: the file's own word, and what it means."""
    word = number_text(value)
    table = words_zh.CHOICES if language == "zh" else _CHOICES
    meaning = table.get((_shared(key), word), "")
    return (
        f"{word} ({meaning})" if meaning and language == "en" else f"{word}（{meaning}）" if meaning else word
    )


def section(name: str, language: str) -> str:
    """The title of a config section; the section's own name where it has none."""
    return (words_zh.SECTIONS if language == "zh" else _SECTIONS).get(name, name)


@cache
def texts(page: str, language: str) -> dict[str, str]:
    """The page's own words (static/words.json): those of `page` and those of every page."""
    every = json.loads(
        resources.files("whitetuner.gui").joinpath("static/words.json").read_text(encoding="utf-8")
    )
    at = LANGUAGES.index(language)
    return {name: both[at] for part in ("all", page) for name, both in every[part].items()}


def _shared(key: str) -> str:
    """Rows of [[data.sets]] have the words of [data], apart from what only they have."""
    plain = without_rows(key)
    if plain.startswith("data.sets.") and plain not in words_zh.FIELDS:
        return plain.replace("data.sets.", "data.", 1)
    return plain
