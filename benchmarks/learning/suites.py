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

SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "kinds": _KINDS,
    "timesteps": _TIMESTEPS,
    "base": _BASE,
    "batch_lr": _BATCH_LR,
    "precision": _PRECISION,
}
ASKS = {
    "kinds": "What learns: LoKr by factor, LoRA by rank, the whole model",
    "timesteps": "Which noise levels are drawn, and how the loss weighs them",
    "base": "Number format of the frozen weights while training; judged on the released weights",
    "batch_lr": "Batch size against learning rate",
    "precision": "Numbers that training is done in",
    "rivals": "The same layers by PEFT and lycoris-lora, in the same loop",
}
