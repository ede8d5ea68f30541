"""What may change when a run goes on, and what may not: the same numbers must come out as without the interruption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whitetuner.config.load import differences
from whitetuner.config.schema import Config
from whitetuner.errors import UserError, UserErrors

#: May change: shown and recorded. A name with a dot at its end stands for its whole section.
FREE = (
    "run.steps", "run.epochs", "run.resume", "run.output_dir", "optimizer.lr", "optimizer.schedule",
    "optimizer.warmup_steps", "optimizer.min_lr_ratio", "optimizer.max_grad_norm", "save.", "preview.", "validation.every",
    "memory.", "log.", "data.workers", "data.cache_dir",
)  # fmt: skip
#: May not: why.
_WHY = {
    "model.": "the adapter was trained on that model",
    "method.": "the saved adapter has that shape",
    "data.": "order and noise follow from the data set",
    "noise.": "the noise levels already seen were drawn so",
    "run.seed": "order and noise follow from the seed",
    "optimizer.": "the saved optimizer state belongs to it",
    "validation.": "losses would no longer be comparable",
}  # fmt: skip


def check_resume(before: Mapping[str, Any], now: Config) -> list[str]:
    """One line for each allowed change. Raises UserErrors for the others, with why."""
    told, errors = [], []
    for key, old, new in differences(before, now.model_dump(mode="json")):
        if key == "run.name":
            continue
        if any(key == one or (one.endswith(".") and key.startswith(one)) for one in FREE):
            told.append(f"{key}: {old} -> {new}")
            continue
        why = next(
            (text for prefix, text in _WHY.items() if key.startswith(prefix)), "it changes what is learned"
        )
        errors.append(
            UserError(
                "{key} was {old} when the run began and is {new} now: {why}",
                where=key,
                mend="set it back, or start a new run (another run.name)",
                key=key,
                old=old,
                new=new,
                why=why,
            )
        )
    if errors:
        raise UserErrors(errors)
    return told
