"""musubi-tuner's and kohya's settings in our words: the data set's TOML, and the training's as TOML or as the command line.

Names and defaults: musubi-tuner's src/musubi_tuner/training/parser_common.py and docs/dataset_config.md, commit 30c658c.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from whitetuner.importers.carried import (
    OPTIMIZERS,
    SCHEDULES,
    Imported,
    Table,
    ending,
    one_of,
    refuse_model,
    same,
    sets_into,
    shuffles,
    what_counts,
)

NAME = "musubi-tuner / kohya"
#: What tells the family: the script's name, or the module of its network.
SCRIPTS = {"flux_2": "flux2-klein", "qwen_image": "qwen-image", "zimage": "zimage", "wan": "wan"}
_WAN_TASKS = {"t2v": "t2v", "i2v": "i2v", "t2i": "t2v"}
_TIMESTEPS = one_of(
    {"uniform": "linear", "sigmoid": "sigmoid", "shift": "shift", "sigma": "linear"}
    | dict.fromkeys(("flux2_shift", "qwen_shift", "flux_shift"), "shift"),
    "linear, sigmoid, weighted, shift and lognorm_blend are there",
)
_ARGUMENTS: Table = {
    "dit": ("model.transformer", str),
    "dit_high_noise": ("model.transformer_2", str),
    "pretrained_model_name_or_path": ("model.path", str),
    "vae": ("model.vae", str),
    "text_encoder": ("model.text_encoder", str),
    "t5": ("model.text_encoder", str),
    "clip": ("model.image_encoder", str),
    "max_train_steps": ("run.steps", int),
    "max_train_epochs": ("run.epochs", int),
    "seed": ("run.seed", int),
    "output_dir": ("run.output_dir", str),
    "output_name": ("run.name", str),
    "learning_rate": ("optimizer.lr", float),
    "optimizer_type": ("optimizer.name", OPTIMIZERS),
    "max_grad_norm": ("optimizer.max_grad_norm", float),
    "lr_scheduler": ("optimizer.schedule", SCHEDULES),
    "lr_warmup_steps": ("optimizer.warmup_steps", int),
    "lr_scheduler_min_lr_ratio": ("optimizer.min_lr_ratio", float),
    "gradient_accumulation_steps": ("optimizer.gradient_accumulation", int),
    "gradient_checkpointing": ("memory.gradient_checkpointing", bool),
    "blocks_to_swap": ("memory.blocks_to_swap", int),
    "timestep_sampling": ("noise.timesteps", _TIMESTEPS),
    "discrete_flow_shift": ("noise.shift", float),
    "sigmoid_scale": ("noise.sigmoid_scale", float),
    "min_timestep": ("noise.min_timestep", float),
    "max_timestep": ("noise.max_timestep", float),
    "weighting_scheme": (
        "noise.loss_weighting",
        one_of(
            {"none": "none", "sigma_sqrt": "sigma_sqrt", "cosmap": "cosmap"},
            "it changes the density of the noise levels there: set noise.timesteps",
        ),
    ),
    "network_dim": ("method.rank", int),
    "network_alpha": ("method.alpha", float),
    "network_weights": ("method.init_from", str),
    "save_every_n_steps": ("save.every", int),
    "save_last_n_steps": (
        "save.keep",
        lambda value: _refuse("it counts steps there: set save.keep to a number of checkpoints"),
    ),
    "sample_every_n_steps": ("preview.every", int),
    "timestep_boundary": (
        "model.options.boundary",
        lambda value: float(value) / (1000 if float(value) > 1 else 1),
    ),
    "compile": ("memory.compile", bool),
}
#: Switches whose place is taken by memory.vram_gb, and bookkeeping.
_IDLE = {
    **dict.fromkeys(
        ("sdpa", "flash_attn", "sage_attn", "xformers", "flash3", "split_attn", "mixed_precision"), ""
    ),
    **dict.fromkeys(
        ("max_data_loader_n_workers", "persistent_data_loader_workers", "network_module", "config_file"), ""
    ),
    **dict.fromkeys(
        ("dataset_config", "task", "model_version", "save_state", "save_precision", "vae_dtype"), ""
    ),
    **dict.fromkeys(
        ("fp8_llm", "fp8_vl", "fp8_t5", "fp8_text_encoder", "dit_dtype", "full_bf16", "offload_inactive_dit"),
        "",
    ),
    **dict.fromkeys(("gradient_checkpointing_cpu_offload", "use_pinned_memory_for_block_swap"), ""),
    **dict.fromkeys(
        ("fp8_base", "fp8_scaled", "network_args", "optimizer_args", "vae_cache_cpu", "log_with"), ""
    ),
    "preserve_distribution_shape": "noise levels outside of min and max are always drawn again here, which keeps the shape",
    "fused_backward_pass": "full training always updates as the backward ends",
    **dict.fromkeys(("masked_loss", "prior_loss_weight"), ""),
    "sample_prompts": "write them as [[preview.prompts]]",
    "logging_dir": "TensorBoard files lie in the run's folder",
}
_DATA: Table = {
    "resolution": (
        "resolution",
        lambda value: round((value[0] * value[1]) ** 0.5) if isinstance(value, list) else int(value),
    ),
    "caption_extension": ("caption_ext", ending),
    "num_repeats": ("repeats", int),
    "class_tokens": ("default_caption", str),
    "caption_dropout_rate": ("caption_dropout", float),
    "shuffle_caption": ("caption_shuffles", shuffles),
    "alpha_mask": ("mask_alpha", bool),
    "target_frames": ("num_frames", same),
    "source_fps": ("frames_fps", float),
    "frame_sample": ("clips_per_video", int),
    "frame_extraction": (
        "clips",
        one_of(
            {"head": "head", "uniform": "uniform", "chunk": "chunks", "full": "chunks"},
            "head, uniform, chunks and random are there",
        ),
    ),
    "control_resolution": (
        "condition_resolution",
        lambda value: round((value[0] * value[1]) ** 0.5) if isinstance(value, list) else int(value),
    ),
}
_DATA_IDLE = {
    **dict.fromkeys(
        ("enable_bucket", "bucket_no_upscale", "cache_directory", "image_directory", "video_directory"), ""
    ),
    **dict.fromkeys(
        ("control_directory", "image_dir", "subsets", "batch_size", "max_frames", "keep_tokens", "is_reg"), ""
    ),
    "image_jsonl_file": "captions stand in files beside the pictures here",
    "video_jsonl_file": "captions stand in files beside the videos here",
}


def _refuse(why: str) -> Any:
    raise ValueError(why)


def is_data(document: Mapping[str, Any]) -> bool:
    """Whether a TOML document is a data set config of musubi-tuner."""
    return isinstance(document.get("datasets"), list)


def is_training(document: Mapping[str, Any]) -> bool:
    """Flat or in any sections, as their --config_file takes it."""
    return bool({"network_module", "dataset_config", "network_dim", "learning_rate"} & _flat(document).keys())


def read(arguments: Mapping[str, Any], data: Mapping[str, Any] | None) -> Imported:
    """arguments: of the training, {} where only a data set is given. Raises UserError for a model that is none of ours."""
    given = _flat(arguments)
    found = Imported(NAME)
    script = str(given.pop("script", ""))
    _model(found, given, script)
    _method(found, given, script)
    for text in _listed(given.get("optimizer_args")):
        name, _, value = text.partition("=")
        if name == "weight_decay":
            found.put("optimizer_args weight_decay", "optimizer.weight_decay", float(value))
        else:
            found.leave(f"optimizer_args {text}", "optimizers have settings of their own here")
    if given.get("fp8_base") or given.get("fp8_scaled"):
        found.put("fp8_base, fp8_scaled", "memory.base", "fp8")
    if str(given.get("blocks_to_swap", "")) == "0":
        given.pop("blocks_to_swap")
    found.take(given, _ARGUMENTS, _IDLE)
    if data is not None:
        _sets(found, data, given)
    return found


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in document.items():
        # YAML has keys that are no words: none at all, numbers, days.
        found.update(_flat(value) if isinstance(value, Mapping) else {str(name).replace("-", "_"): value})
    return found


def _listed(value: Any) -> list[str]:
    return (
        []
        if value is None
        else [
            str(one)
            for one in (value if isinstance(value, Sequence) and not isinstance(value, str) else [value])
        ]
    )


def _model(found: Imported, given: Mapping[str, Any], script: str) -> None:
    told = f"{script} {given.get('network_module', '')}"
    family = next((ours for name, ours in SCRIPTS.items() if re.search(rf"(^|[_.]){name}(_|\b)", told)), None)
    if family is None:
        raise refuse_model(NAME, script or given.get("network_module") or "a data set alone", SCRIPTS)
    found.put(script or "network_module", "model.family", family)
    version = str(given.get("model_version", ""))
    task = str(given.get("task", ""))
    if family == "wan":
        found.put(f"task = {task}", "model.task", _WAN_TASKS.get(task.partition("-")[0], "t2v"))
        if "dit_high_noise" in given:
            found.put("dit_high_noise", "model.options.expert", "both")
    elif version.startswith("edit"):
        found.put(f"model_version = {version}", "model.task", "edit")
        found.put(f"model_version = {version}", "model.options.variant", version)


def _method(found: Imported, given: Mapping[str, Any], script: str) -> None:
    module = str(given.get("network_module", ""))
    algorithm = next(
        (one.partition("=")[2] for one in _listed(given.get("network_args")) if one.startswith("algo=")), ""
    )
    kind = "lokr" if "lokr" in module or algorithm == "lokr" else "lora"
    if script.endswith("_train.py") and not module:
        kind = "full"
    found.put(module or script or "network", "method.kind", kind)
    for text in _listed(given.get("network_args")):
        name, _, value = text.partition("=")
        if name == "factor" and kind == "lokr":
            found.put("network_args factor", "method.factor", int(value))
        elif name == "loraplus_lr_ratio" and kind == "lora":
            found.put("network_args loraplus_lr_ratio", "optimizer.lora_plus", float(value))
        elif name != "algo":
            found.leave(f"network_args {text}", "there is nothing like it here")
    if kind == "lokr":
        found.put("network_dim", "method.full_matrix", int(given.get("network_dim", 4) or 4) >= 10_000)


def _sets(found: Imported, document: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    general = dict(document.get("general") or {})
    rows, sizes = [], {int(general.get("batch_size", 1))}
    for number, one in enumerate(document["datasets"]):
        for subset in one.get("subsets") or [{}]:
            mine = Imported(NAME)
            given = {**general, **one, **subset}
            sizes.add(int(given.get("batch_size", 1)))
            _folder(mine, given)
            masks = given.pop("conditioning_data_dir", None)
            mine.take(given, _DATA, _DATA_IDLE)
            _weights(mine, given, masks, arguments)
            rows.append(mine.values)
            found.carried += [
                (f"datasets[{number}].{theirs}", f"data.{ours}") for theirs, ours in mine.carried
            ]
            found.left += [(f"datasets[{number}].{theirs}", why) for theirs, why in mine.left]
    if any("conditions" in row for row in rows):
        found.put("control_directory", "model.task", "edit")
    found.put("batch_size", "data.batch_size", max(sizes))
    if len(sizes) > 1:
        found.leave(
            f"batch_size of single sets: {sorted(sizes)}",
            "one batch size holds for all sets; the largest is set",
        )
    sets_into(found.values, rows)


def _weights(mine: Imported, given: Mapping[str, Any], masks: Any, arguments: Mapping[str, Any]) -> None:
    """What of a set counts in the loss: masks (pictures of conditions, with masked_loss), regularisation; shuffled captions."""
    if masks and arguments.get("masked_loss"):
        mine.put("conditioning_data_dir", "mask_dir", str(masks))
    elif masks:
        mine.leave("conditioning_data_dir", "there are no control nets here")
    weight = float(arguments.get("prior_loss_weight", 1.0)) if given.get("is_reg") else 1.0
    what_counts(mine, 0.0, int(given.get("keep_tokens") or 0), weight)  # what is black counts nothing there


def _folder(mine: Imported, given: Mapping[str, Any]) -> None:
    control = given.get("control_directory")
    if given.get("video_directory"):
        mine.put("video_directory", "videos", str(given["video_directory"]))
        return
    folder = given.get("image_directory") or given.get("image_dir")
    if folder:
        mine.put("image_directory", "target" if control else "images", str(folder))
    if control:
        mine.put("control_directory", "conditions", [str(control)])
