"""Full training: what of the config does not go together with it, and in which numbers it is done."""

from __future__ import annotations

from typing import Any

from whitetuner.config.schema import Config
from whitetuner.errors import UserError, UserErrors

#: Optimizers that find one step size from the gradients of all weights at once.
_WHOLE_AT_ONCE = ("prodigy",)


def refuse_wrong_full(config: Config) -> None:
    """Raises UserError(s) for what full training cannot do, each with why. Nothing for other methods."""
    if config.method.kind != "full":
        return
    errors = []
    base, precision = config.memory.base, config.method.precision
    if base not in ("auto", "bf16"):
        errors.append(
            UserError(
                "full training changes the weights themselves, and {base} cannot hold such small changes",
                where="memory.base",
                mend='set memory.base = "bf16" (or "auto"), or train an adapter (method.kind = "lokr")',
                base=base,
            )
        )
    wanted = dtype_wanted(config)
    asked = "bf16" if base == "bf16" and config.memory.dtype == "auto" else config.memory.dtype
    if wanted is not None and asked not in ("auto", wanted):
        errors.append(
            UserError(
                "{precision} is of {wanted} weights, but they are asked for as {asked}",
                where="method.precision",
                mend='leave memory.dtype and memory.base at "auto", or set method.precision = "auto"',
                precision=precision,
                wanted=wanted,
                asked=asked,
            )
        )
    if config.optimizer.name in _WHOLE_AT_ONCE:
        errors.append(
            UserError(
                "{name} finds its step from the gradients of all weights at once, which full training never has",
                where="optimizer.name",
                mend="use adafactor, adamw8bit or adamw",
                name=config.optimizer.name,
            )
        )
    if config.optimizer.lora_plus != 1.0:
        errors.append(
            UserError(
                "lora_plus is for the two factors of an adapter, which full training does not have",
                where="optimizer.lora_plus",
                mend='set optimizer.lora_plus = 1, or train an adapter (method.kind = "lora")',
            )
        )
    if config.method.init_from is not None:
        errors.append(
            UserError(
                "full training begins from a model, not from an adapter",
                where="method.init_from",
                mend="merge the adapter into the model (`whitetuner merge`) and give that as model.path, or begin from a "
                "run's final/transformer with model.transformer",
            )
        )
    if errors:
        raise UserErrors(errors) if len(errors) > 1 else errors[0]


def dtype_wanted(config: Config) -> str | None:
    """The number format that method.precision asks of the weights; None where it takes what is there."""
    precision = config.method.precision
    if config.method.kind != "full" or precision == "auto":
        return None
    return "fp32" if precision == "fp32" else "bf16"


def precision_of(config: Config, dtype: str) -> Any:
    """ "auto": float32 weights are trained as they are, bf16 ones with stochastic rounding. dtype: "fp32" or "bf16"."""
    if config.method.precision != "auto":
        return config.method.precision
    return "fp32" if dtype == "fp32" else "bf16_stochastic"
