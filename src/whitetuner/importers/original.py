"""What the original White Tuner was given: a trainer's command line, or the JSON it keeps beside its checkpoints.

Names of its options as its pages send them; `timestep_type` means here what its name says, which it did not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whitetuner.errors import UserError
from whitetuner.importers.carried import Imported, Table, ending, one_of

NAME = "the original White Tuner"
#: Its scripts -> (family, task).
SCRIPTS = {
    "flux2_klein_trainer.py": ("flux2-klein", "edit"),
    "flux2_klein_t2i_trainer.py": ("flux2-klein", "t2i"),
    "wan_trainer.py": ("wan", "i2v"),
    "qwen_image_trainer.py": ("qwen-image", "t2i"),
    "trainer.py": ("qwen-image", "edit"),
    "zimage_trainer.py": ("zimage", "t2i"),
    "zimage_fixed_v2_trainer.py": ("zimage-v2", "t2i"),
    "glm_image_trainer.py": ("glm-image", "t2i"),
}
_TIMESTEPS = one_of({name: name for name in ("linear", "sigmoid", "weighted", "shift", "lognorm_blend")})
_TABLE: Table = {
    "model_id": ("model.path", str),
    "dit_path": ("model.transformer", str),
    "dit_high_noise_path": ("model.transformer_2", str),
    "vae_path": ("model.vae", str),
    "t5_path": ("model.text_encoder", str),
    "clip_path": ("model.image_encoder", str),
    "output_dir": ("run.output_dir", str),
    "num_train_steps": ("run.steps", int),
    "checkpoint_every_n_steps": ("save.every", int),
    "checkpoints_total_limit": ("save.keep", int),
    "seed": ("run.seed", int),
    "learning_rate": ("optimizer.lr", float),
    "lr_warmup_steps": ("optimizer.warmup_steps", int),
    "max_grad_norm": ("optimizer.max_grad_norm", float),
    "gradient_accumulation_steps": ("optimizer.gradient_accumulation", int),
    "image_folder": ("data.images", str),
    "video_folder": ("data.videos", str),
    "target_folder": ("data.target", str),
    "prompt": ("data.prompt", str),
    "default_caption": ("data.default_caption", str),
    "caption_ext": ("data.caption_ext", ending),
    "resolution": ("data.resolution", int),
    "num_frames": ("data.num_frames", int),
    "batch_size": ("data.batch_size", int),
    "prompt_dropout_prob": ("data.caption_dropout", float),
    "timestep_type": ("noise.timesteps", _TIMESTEPS),
    "sigmoid_scale": ("noise.sigmoid_scale", float),
    "shift_scale": ("noise.shift", float),
    "lognorm_alpha": ("noise.lognorm_alpha", float),
    "noise_offset": ("noise.noise_offset", float),
    "min_timestep": ("noise.min_timestep", float),
    "max_timestep": ("noise.max_timestep", float),
    "loss_weighting_scheme": (
        "noise.loss_weighting",
        one_of({"none": "none", "sigma_sqrt": "sigma_sqrt", "cosmap": "cosmap"}),
    ),
    "timestep_boundary": ("model.options.boundary", float),
    "n_double_layers": ("model.options.double_layers", int),
    "n_single_layers": ("model.options.single_layers", int),
    "blocks_to_swap": ("memory.blocks_to_swap", int),
    "gradient_checkpointing_cpu_offload": ("memory.activation_offload", bool),
}
_IDLE = {
    **dict.fromkeys(
        ("script", "use_caption", "use_pinned_memory", "full_training", "training_mode", "wan_version"), ""
    ),
    **dict.fromkeys(
        ("condition_folder", "condition_folders", "condition_folder_2", "condition_folder_3"), ""
    ),
    **dict.fromkeys(
        ("use_fp8", "fp8_scaled", "task_type", "mixed_precision", "adjusted_num_train_steps"), ""
    ),
    "resume_from_checkpoint": "its checkpoints hold other things; method.init_from takes an adapter file",
    "prior_dropout_prob": "caption_dropout drops the prior tokens too",
}


def is_one(document: Mapping[str, Any]) -> bool:
    """Whether a document holds settings of the original White Tuner."""
    if document.get("script") in SCRIPTS:
        return True
    return "num_train_steps" in document and bool(
        {"timestep_type", "checkpoint_every_n_steps", "checkpoints_total_limit"} & document.keys()
    )


def read(document: Mapping[str, Any], family: str | None = None) -> Imported:
    """family: where the file does not tell it. Raises UserError when nobody does."""
    found = Imported(NAME)
    family, task = _kind(document, family)
    if document.get("task_type") == "edit" or document.get("target_folder"):
        task = "edit"
    found.put(str(document.get("script") or "its options"), "model.family", family)
    found.put(str(document.get("script") or "its options"), "model.task", task)
    is_full = (
        bool(document.get("full_training"))
        or document.get("training_mode") == "full"
        or family in ("zimage-v2", "glm-image")
    )
    found.put("training_mode", "method.kind", "full" if is_full else "lokr")
    if document.get("wan_version"):
        found.put("wan_version", "model.options.variant", f"i2v-{document['wan_version']}")
    conditions: list[str] = []
    for name in ("condition_folders", "condition_folder", "condition_folder_2", "condition_folder_3"):
        given = document.get(name)
        conditions += [str(one) for one in (given if isinstance(given, list) else [given]) if one]
    if conditions:
        found.put("condition_folder", "data.conditions", conditions)
    if (document.get("use_fp8") or document.get("fp8_scaled")) and not is_full:
        found.put("use_fp8, fp8_scaled", "memory.base", "fp8")
    found.take(
        {key: value for key, value in document.items() if key != "blocks_to_swap" or value}, _TABLE, _IDLE
    )
    return found


def _kind(document: Mapping[str, Any], family: str | None) -> tuple[str, str]:
    script = str(document.get("script", ""))
    if script in SCRIPTS:
        return SCRIPTS[script]
    if family is not None:
        return next((one for one in SCRIPTS.values() if one[0] == family), (family, "t2i"))
    if "n_double_layers" in document:
        return "zimage-v2", "t2i"
    if "wan_version" in document or "video_folder" in document:
        return "wan", "i2v"
    raise UserError(
        "the file does not tell which model it is for",
        where="--from",
        mend="add --family; known: {known}",
        known=", ".join(sorted({one for one, _ in SCRIPTS.values()})),
    )
