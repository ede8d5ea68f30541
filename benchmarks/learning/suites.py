"""What the laboratory compares: suite -> cell -> what is changed in the demo's recipe. At most twelve cells each."""

from __future__ import annotations

from typing import Any

LORA, FULL = {"method.kind": "lora"}, {"method.kind": "full"}
#: A whole model learns at a lower rate than a zero-initialised adapter.
FULL_LR = 5e-4


def lokr(factor: int, rank: int | None = None) -> dict[str, Any]:
    """rank: of the second factor; None: it is a full matrix."""
    values: dict[str, Any] = {"method.factor": factor, "method.full_matrix": rank is None}
    return values if rank is None else {**values, "method.rank": rank}


def noise(timesteps: str, weighting: str) -> dict[str, Any]:
    bias = {"noise.sigmoid_bias": 0.6 if timesteps == "sigmoid" else 0.0}
    return {"noise.timesteps": timesteps, "noise.loss_weighting": weighting, **bias}


_KINDS: dict[str, dict[str, Any]] = {
    "LoKr factor 4": lokr(4),
    "LoKr factor 8": lokr(8),
    "LoKr factor 16": lokr(16),
    "LoKr factor 4, rank 8": lokr(4, 8),
    "LoRA rank 4": {**LORA, "method.rank": 4},
    "LoRA rank 16": {**LORA, "method.rank": 16},
    "LoRA rank 64": {**LORA, "method.rank": 64},
    "full, lr 5e-4": {**FULL, "optimizer.lr": FULL_LR},
}
_TIMESTEPS = {
    f"{timesteps}, {weighting}": noise(timesteps, weighting)
    for timesteps in ("linear", "sigmoid", "shift", "lognorm_blend", "weighted")
    for weighting in ("none", "sigma_sqrt", "cosmap")
    # "weighted" weighs already; so that there are twelve, a blend with a weight for little noise is left out
    if weighting == "none"
    or timesteps in ("linear", "sigmoid", "shift")
    or (timesteps, weighting) == ("lognorm_blend", "cosmap")
}
_BASE: dict[str, dict[str, Any]] = {
    "fp32": {"memory.dtype": "fp32"},
    "fp32, 2 blocks swapped": {"memory.dtype": "fp32", "memory.blocks_to_swap": 2},
    "bf16": {"memory.dtype": "bf16"},
    "int8": {"memory.base": "int8"},
    "fp8": {"memory.base": "fp8"},
    "nf4": {"memory.base": "nf4"},
}
_BATCH_LR = {
    f"batch {batch}, lr {lr:g}": {"data.batch_size": batch, "optimizer.lr": lr}
    for batch in (6, 12, 24)
    for lr in (1e-3, 2e-3, 4e-3, 8e-3)
}
_PRECISION: dict[str, dict[str, Any]] = {
    "LoKr, fp32": {"memory.dtype": "fp32"},
    "LoKr, bf16": {"memory.dtype": "bf16"},
    **{
        f"full, {precision}": {**FULL, "optimizer.lr": FULL_LR, "method.precision": precision}
        for precision in ("fp32", "fp32_master", "kahan", "bf16_stochastic")
    },
}
#: Is a rate that suits one kind right for another, and what do scale, warm-up and schedule do.
_RATES: dict[str, dict[str, Any]] = {
    **{f"LoKr 4, lr {lr:g}": {**lokr(4), "optimizer.lr": lr} for lr in (8e-3, 1.6e-2)},
    **{f"LoKr 8, lr {lr:g}": {**lokr(8), "optimizer.lr": lr} for lr in (8e-3, 1.6e-2)},
    "LoKr 16, lr 0.016": {**lokr(16), "optimizer.lr": 1.6e-2},
    "LoKr 4, no warm-up": {**lokr(4), "optimizer.warmup_steps": 0},
    "LoKr 4, rate kept": {**lokr(4), "optimizer.schedule": "constant"},
    **{f"LoRA 16, lr {lr:g}": {**LORA, "method.rank": 16, "optimizer.lr": lr} for lr in (1e-3, 2e-3, 8e-3)},
    "LoRA 16, alpha 4": {**LORA, "method.rank": 16, "method.alpha": 4.0},
    "full, lr 0.001": {**FULL, "optimizer.lr": 1e-3},
}
#: Where the noise levels lie; meant for every concept: an outline, a texture and a layout may want others.
_LEVELS: dict[str, dict[str, Any]] = {
    "linear": {"noise.timesteps": "linear", "noise.sigmoid_bias": 0.0},
    **{
        f"sigmoid, bias {bias:g}": {"noise.timesteps": "sigmoid", "noise.sigmoid_bias": bias}
        for bias in (-0.6, 0.0, 0.6, 1.2)
    },
    "shift 3": {"noise.timesteps": "shift", "noise.shift": 3.0, "noise.sigmoid_bias": 0.0},
    "lognorm_blend": {"noise.timesteps": "lognorm_blend", "noise.sigmoid_bias": 0.0},
}
_LORA_SLOW = {**LORA, "method.rank": 16, "optimizer.lr": 1e-3}
#: Against the demo's recipe: average .98, a tenth of captions dropped, half of the pictures old ones. "new", "old" and "asked"
#: are of the pictures, see teach.py.
_TECHNIQUES: dict[str, dict[str, Any]] = {
    "as the demo": {},
    "no average (EMA)": {"optimizer.ema": 0.0},
    "min-SNR 5": {"noise.loss_weighting": "min_snr"},
    "no caption dropout": {"data.caption_dropout": 0.0},
    "no old pictures": {"old": None},
    "old pictures' loss x 0.3": {"old": {"loss_weight": 0.3}},
    "masks, the rest counts 0.1": {"new": {"mask_dir": "masks"}},
    "LoRA 16, lr 0.001": _LORA_SLOW,
    "LoRA 16, lr 0.001, LoRA+ 4": {**_LORA_SLOW, "optimizer.lora_plus": 4.0},
    "LoRA 16, lr 0.001, LoRA+ 16": {**_LORA_SLOW, "optimizer.lora_plus": 16.0},
    "tags, as written": {"new": {"images": "tags"}, "asked": "tags"},
    "tags, and 4 shuffles": {"new": {"images": "tags", "caption_shuffles": 4}, "asked": "tags"},
}

SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "kinds": _KINDS,
    "timesteps": _TIMESTEPS,
    "levels": _LEVELS,
    "base": _BASE,
    "batch_lr": _BATCH_LR,
    "precision": _PRECISION,
    "rates": _RATES,
    "techniques": _TECHNIQUES,
}
#: Suites whose cells are judged on the way, too: score against steps.
CURVES = ("rates", "techniques")
ASKS = {
    "kinds": "What learns: LoKr by factor, LoRA by rank, the whole model",
    "timesteps": "Which noise levels are drawn, and how the loss weighs them",
    "levels": "Where the noise levels lie",
    "base": "Number format of the frozen weights while training; judged on the released weights",
    "batch_lr": "Batch size against learning rate",
    "precision": "Numbers that training is done in",
    "rates": "The learning rate of each kind, alpha, warm-up and schedule",
    "techniques": "Techniques, one at a time",
    "rivals": "Rivals: PEFT's and lycoris-lora's layers in our loop, and other trainers' own programs",
}
