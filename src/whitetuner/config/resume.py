"""What may change when a run goes on, and what may not: the same numbers must come out as without the interruption."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from whitetuner.config.load import differences, flat
from whitetuner.config.migrate import today
from whitetuner.config.schema import Config
from whitetuner.config.told import field_of
from whitetuner.errors import UserError, UserErrors

#: May change: shown and recorded. A dot at the end stands for the whole section.
FREE = (
    "run.name",
    "run.output_dir",
    "run.steps",
    "run.epochs",
    "run.resume",
    "optimizer.lr",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.min_lr_ratio",
    "save.",
    "preview.",
    "validation.every",
    "memory.",
    "log.",
    "data.workers",
    "data.cache_dir",
    # Folders may have moved; that they hold the same pictures and captions is told by their contents (the data-set hash).
    "data.images",
    "data.target",
    "data.conditions",
    "data.videos",
    "data.mask_dir",
    "data.sets.images",
    "data.sets.target",
    "data.sets.conditions",
    "data.sets.videos",
    "data.sets.mask_dir",
)
#: May change as well when another run begins there: order, noise and measure are its own.
FREE_IN_FORK = (
    *FREE,
    "run.seed",
    "data.",
    "noise.",
    "validation.",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "optimizer.gradient_accumulation",
)
#: May not: why.
_WHY = {
    "model.": "the adapter was trained on that model",
    "method.": "what is saved has that shape and start",
    "data.": "order and noise follow from the data set",
    "noise.": "the noise levels seen so far were drawn so",
    "run.seed": "order and noise follow from the seed",
    "optimizer.": "the saved state of the optimizer belongs to it",
    "validation.": "its losses could not be compared with the earlier ones",
}


def check_resume(before: Mapping[str, Any], now: Config) -> list[str]:
    """One line for each allowed change. Raises UserError(s) for the others, with why.

    before: the config that the run began with, as `Loaded.document` gave it
    """
    return _allowed(before, now, FREE)


def check_fork(before: Mapping[str, Any], now: Config) -> list[str]:
    """As `check_resume`, for a new run that begins at a checkpoint of another: data, noise and seed may be others."""
    return _allowed(before, now, FREE_IN_FORK)


def _allowed(before: Mapping[str, Any], now: Config, free: tuple[str, ...]) -> list[str]:
    told, errors = [], []
    before = today(before)[0]
    said = flat(before)
    for key, old, new in differences(before, now.model_dump(mode="json")):
        if key not in said:  # an option that came later: till then it was as its default is
            old = _default(key)
        if key == "run.name" or old == new:
            continue
        plain = re.sub(r"\[\d+\]", "", key)
        if any(plain == one or (one.endswith(".") and plain.startswith(one)) for one in free):
            told.append(f"{key}: {old} -> {new}")
            continue
        why = next(
            (text for prefix, text in _WHY.items() if plain.startswith(prefix)), "it changes what is learned"
        )
        errors.append(
            UserError(
                "{old} when the run began, {new} now: {why}",
                where=key,
                mend="set it back, or start a new run (another run.name; method.init_from takes the adapter along)",
                old=old,
                new=new,
                why=why,
            )
        )
    if errors:
        raise UserErrors(errors) if len(errors) > 1 else errors[0]
    return told


def _default(key: str) -> Any:
    """As JSON has it; None for what is no option of the schema."""
    field = field_of(key)
    if field is None or field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value
