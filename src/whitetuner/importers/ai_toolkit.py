"""A job of ai-toolkit (YAML or JSON) in our words. Names and defaults: its toolkit/config_modules.py, commit 27a03a9."""

from __future__ import annotations

from collections.abc import Mapping
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

NAME = "ai-toolkit"
#: Its arch -> (family, task, options).
MODELS: dict[str, tuple[str, str, dict[str, str]]] = {
    "flux2_klein_4b": ("flux2-klein", "t2i", {}),
    "flux2_klein_9b": ("flux2-klein", "t2i", {}),
    "qwen_image": ("qwen-image", "t2i", {}),
    "qwen_image_edit": ("qwen-image", "edit", {}),
    "qwen_image_edit_plus": ("qwen-image", "edit", {}),
    "zimage": ("zimage", "t2i", {}),
    "wan21": ("wan", "t2v", {}),
    "wan21_i2v": ("wan", "i2v", {}),
    "wan22_14b": ("wan", "t2v", {}),
    "wan22_14b_i2v": ("wan", "i2v", {}),
    "wan22_5b": ("wan", "t2v", {"variant": "ti2v-5b"}),
}
_TIMESTEPS = one_of(
    {
        "sigmoid": "sigmoid",
        "linear": "linear",
        "weighted": "weighted",
        "lognorm_blend": "lognorm_blend",
        "shift": "shift",
    },
    "linear, sigmoid, weighted, shift and lognorm_blend are there",
)
#: "uint3|adapter": its accuracy adapters belong to its own quantisation.
_BASE = one_of(
    {"qfloat8": "fp8", "float8": "fp8", "qint8": "int8", "int8": "int8"},
    "set memory.base or leave it to vram_gb",
)
_TRAIN: Table = {
    "batch_size": ("data.batch_size", int),
    "steps": ("run.steps", int),
    "gradient_accumulation": ("optimizer.gradient_accumulation", int),
    "gradient_accumulation_steps": ("optimizer.gradient_accumulation", int),
    "gradient_checkpointing": ("memory.gradient_checkpointing", bool),
    "optimizer": ("optimizer.name", OPTIMIZERS),
    "lr": ("optimizer.lr", float),
    "lr_scheduler": ("optimizer.schedule", SCHEDULES),
    "max_grad_norm": ("optimizer.max_grad_norm", float),
    "timestep_type": ("noise.timesteps", _TIMESTEPS),
    "seed": ("run.seed", int),
    "noise_offset": ("noise.noise_offset", float),
    "min_denoising_steps": ("noise.min_timestep", float),
    "max_denoising_steps": ("noise.max_timestep", float),
}
_TRAIN_IDLE = {
    "train_unet": "",
    "noise_scheduler": "",
    "dtype": "",
    "cache_text_embeddings": "",
    "unload_text_encoder": "",
    "disable_sampling": "",
    "skip_first_sample": "",
    "switch_boundary_every": "",
    "train_text_encoder": "text encoders are not trained here",
}
_NETWORK: Table = {
    "linear": ("method.rank", int),
    "rank": ("method.rank", int),
    "linear_alpha": ("method.alpha", float),
    "alpha": ("method.alpha", float),
    "lokr_factor": ("method.factor", int),
    "lokr_full_rank": ("method.full_matrix", bool),
    "pretrained_lora_path": ("method.init_from", str),
}
_NETWORK_IDLE = {
    "type": "",
    "transformer_only": "",
    "conv": "these models have no convolutions to adapt",
    "conv_alpha": "",
}
_SET: Table = {
    "caption_ext": ("caption_ext", ending),
    "default_caption": ("default_caption", str),
    "caption_dropout_rate": ("caption_dropout", float),
    "trigger_word": ("trigger", str),
    "resolution": ("resolution", same),
    "num_repeats": ("repeats", int),
    "fps": ("fps", float),
    "mask_path": ("mask_dir", str),
    "alpha_mask": ("mask_alpha", bool),
    "shuffle_tokens": ("caption_shuffles", shuffles),
    "loss_multiplier": ("loss_weight", float),
}
_SET_IDLE = {
    **dict.fromkeys(("keep_tokens", "mask_min_value", "is_reg"), ""),
    "invert_mask": "white counts here: turn the masks round",
    **dict.fromkeys(
        ("folder_path", "dataset_path", "control_path", "num_frames", "cache_latents_to_disk"), ""
    ),
    **dict.fromkeys(
        ("cache_latents", "cache_text_embeddings", "buckets", "bucket_tolerance", "is_video"), ""
    ),
    **dict.fromkeys((f"control_path_{n}" for n in (1, 2, 3)), ""),
}
_SAVE: Table = {"save_every": ("save.every", int), "max_step_saves_to_keep": ("save.keep", int)}


def is_one(document: Mapping[str, Any]) -> bool:
    """Whether a YAML document is a job of ai-toolkit."""
    config = document.get("config")
    return isinstance(config, Mapping) and isinstance(config.get("process"), list)


def read(document: Mapping[str, Any]) -> Imported:
    """Raises UserError for a model that is none of ours."""
    config = document["config"]
    process = next((one for one in config["process"] if isinstance(one, Mapping)), {})
    found = Imported(NAME)
    if config.get("name"):
        found.put("name", "run.name", str(config["name"]))
    if process.get("training_folder"):
        found.put("training_folder", "run.output_dir", str(process["training_folder"]))
    sets = [one for one in process.get("datasets") or [] if isinstance(one, Mapping)]
    _model(found, process.get("model") or {}, sets)
    _method(found, process.get("network"))
    train = dict(process.get("train") or {})
    regular = float(train.pop("reg_weight", None) or 1.0)
    decay = (train.pop("optimizer_params", None) or {}).get("weight_decay")
    if decay is not None:
        found.put("train.optimizer_params.weight_decay", "optimizer.weight_decay", float(decay))
    ema = train.pop("ema_config", None) or {}
    if ema.get("use_ema"):
        found.put("train.ema_config.ema_decay", "optimizer.ema", float(ema.get("ema_decay", 0.99)))
    found.take(train, _TRAIN, _TRAIN_IDLE, "train.")
    found.take(process.get("save") or {}, _SAVE, {"dtype": "", "save_format": ""}, "save.")
    for key in ("trigger_word",):
        if process.get(key):
            found.put(key, "data.trigger", str(process[key]))
    _sets(found, sets, regular)
    _previews(found, process.get("sample") or {})
    return found


def _model(found: Imported, model: Mapping[str, Any], sets: list[Mapping[str, Any]]) -> None:
    arch = str(model.get("arch") or "").partition(":")[0]
    if arch not in MODELS:
        raise refuse_model(NAME, arch or model.get("name_or_path"), MODELS)
    family, task, options = MODELS[arch]
    if any(_controls(one) for one in sets) and family == "flux2-klein":
        task = "edit"
    found.put(f"model.arch = {arch}", "model.family", family)
    found.put(f"model.arch = {arch}", "model.task", task)
    for name, value in options.items():
        found.put(f"model.arch = {arch}", f"model.options.{name}", value)
    if model.get("name_or_path"):
        found.put("model.name_or_path", "model.path", str(model["name_or_path"]))
    experts = model.get("model_kwargs") or {}
    if family == "wan" and "train_high_noise" in experts:
        both = bool(experts.get("train_high_noise", True)), bool(experts.get("train_low_noise", True))
        word = {(True, True): "both", (True, False): "high", (False, True): "low"}.get(both)
        if word:
            found.put("model.model_kwargs.train_high_noise, train_low_noise", "model.options.expert", word)
    if model.get("quantize") and model.get("qtype"):
        try:
            found.put("model.qtype", "memory.base", _BASE(str(model["qtype"])))
        except ValueError as error:
            found.leave(f"model.qtype = {model['qtype']}", str(error))
    if model.get("assistant_lora_path"):
        found.put(
            "model.assistant_lora_path", "model.options.merge_adapter", str(model["assistant_lora_path"])
        )


def _method(found: Imported, network: Any) -> None:
    if not isinstance(network, Mapping):
        found.put("no network", "method.kind", "full")
        return
    kind = str(network.get("type", "lora")).lower()
    if kind not in ("lora", "lokr"):
        found.leave(f"network.type = {kind}", "LoKr, LoRA and full are there; LoKr is set")
        kind = "lokr"
    found.put("network.type", "method.kind", kind)
    given = dict(network)
    if kind == "lokr":
        full = bool(given.setdefault("lokr_full_rank", True))
        for name in ("linear", "linear_alpha", "rank", "alpha") if full else ():
            given.pop(name, None)  # not used by it either
    found.take(given, _NETWORK, _NETWORK_IDLE, "network.")


def _controls(one: Mapping[str, Any]) -> list[str]:
    given = one.get("control_path") or [one.get(f"control_path_{n}") for n in (1, 2, 3)]
    return [str(path) for path in (given if isinstance(given, list) else [given]) if path]


def _sets(found: Imported, sets: list[Mapping[str, Any]], regular: float) -> None:
    """regular: their weight of the loss of regularisation sets."""
    task = found.values["model.task"]
    rows = []
    for number, one in enumerate(sets):
        mine = Imported(NAME)
        folder = str(one.get("folder_path") or one.get("dataset_path") or "")
        kind = "target" if task == "edit" else "images"
        if task in ("i2v", "t2v") and int(one.get("num_frames") or 1) > 1:
            kind = "videos"
            mine.put("num_frames", "num_frames", int(one["num_frames"]))
        mine.put("folder_path", kind, folder)
        if task == "edit":
            mine.put("control_path", "conditions", _controls(one))
        mine.take(one, _SET, _SET_IDLE)
        floor, keep = float(one.get("mask_min_value") or 0), int(one.get("keep_tokens") or 0)
        what_counts(mine, floor, keep, regular if one.get("is_reg") else 1.0)
        sides = mine.values.get("resolution")
        if isinstance(sides, list):
            mine.values["resolution"] = sorted({int(side) for side in sides})
        rows.append(mine.values)
        found.carried += [(f"datasets[{number}].{theirs}", f"data.{ours}") for theirs, ours in mine.carried]
        found.left += [(f"datasets[{number}].{theirs}", why) for theirs, why in mine.left]
    sets_into(found.values, rows)


def _previews(found: Imported, sample: Mapping[str, Any]) -> None:
    prompts = sample.get("samples") or [{"prompt": text} for text in sample.get("prompts") or []]
    if not prompts:
        return
    if sample.get("sample_every"):
        found.put("sample.sample_every", "preview.every", int(sample["sample_every"]))
    rows = []
    for number, one in enumerate(prompts):
        step = number if sample.get("walk_seed") else 0
        row: dict[str, Any] = {
            "text": str(one.get("prompt", "")),
            "seed": int(one.get("seed", sample.get("seed", 42) + step)),
        }
        if sample.get("neg"):
            row["negative"] = str(sample["neg"])
        width, height = one.get("width", sample.get("width")), one.get("height", sample.get("height"))
        row.update({"size": [int(width), int(height)]} if width and height else {})
        for theirs, ours, convert in (("sample_steps", "steps", int), ("guidance_scale", "cfg", float)):
            if one.get(theirs, sample.get(theirs)) is not None:
                row[ours] = convert(one.get(theirs, sample.get(theirs)))
        frames = one.get("num_frames", sample.get("num_frames"))
        row.update({"frames": int(frames)} if frames and int(frames) > 1 else {})
        images = [
            str(one[name]) for name in ("ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3") if one.get(name)
        ]
        row.update({"images": images} if images else {})
        rows.append(row)
    found.put("sample.prompts", "preview.prompts", rows)
