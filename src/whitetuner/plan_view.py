"""`plan`: how a config or a released model fits a card, in sentences, a table or JSON. Loads no weight and needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from whitetuner.config.full import dtype_wanted
from whitetuner.config.landed import refuse_not_landed
from whitetuner.config.load import load_config
from whitetuner.encoding import chosen, look_at
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.families import registry
from whitetuner.memory.machine import GIB, Machine, this_machine, typical_machine
from whitetuner.memory.plan import Choice, Plan
from whitetuner.memory.quantize import Kind
from whitetuner.planning import Reckoning, Shape, Sketched, asked_base, largest
from whitetuner.prepared import find_items
from whitetuner.records import Size
from whitetuner.rehearsal import rehearse
from whitetuner.released import plan_released
from whitetuner.resolve import choose_dtype, open_family

#: Cards that are told of when none was named and none is here.
CARDS_GB = (8, 12, 16, 24, 32)
#: More than any machine has: beyond it stands a slip of the finger.
_MOST_GB = 4096
_LARGEST_PX = 8192


def machines(vram: float | None, host: float | None, measure: bool) -> list[Machine]:
    """The card that is here or was named, or one of every usual size. Raises UserError for a measurement without a card."""
    for where, given in (("--vram", vram), ("--host", host)):
        if given is not None and not 0 < given <= _MOST_GB:  # neither is true of NaN
            raise UserError(
                "{given} GB is no memory that a machine has",
                where=where,
                mend="give what there is in GB, e.g. 12",
                given=given,
            )
    if torch.cuda.is_available() and (vram is None or measure):
        here = this_machine(torch.device("cuda:0"), vram)
        return [here if host is None else replace(here, host_bytes=int(host * GIB))]
    if measure:
        raise UserError(
            "there is no GPU here to measure",
            where="--measure",
            mend="name the card's memory instead: --vram 12",
            code=EXIT_ENVIRONMENT,
        )
    return [typical_machine(one, host) for one in ((vram,) if vram else CARDS_GB)]


def of_config(path: Path, overrides: Sequence[str], on: Sequence[Machine]) -> dict[str, Any]:
    """{"what", "shape", "steps", "plans": [(machine, plan or why not)]} of a config over its own pictures.

    Raises UserError for what would stop the run itself.
    """
    config = load_config(path, overrides).config
    refuse_not_landed(config)
    family = open_family(config)
    rehearse(config, family, here=False)
    if config.memory.limit_gb is not None and len(on) > 1:
        on = [typical_machine(config.memory.limit_gb)]
    memory = config.memory
    # As on a card, unless the run itself will be on the CPU (memory.vram_gb then tries a plan out).
    device = torch.device("cpu" if memory.device == "cpu" else "cuda")
    asked = dtype_wanted(config) or ("bf16" if memory.base == "bf16" else memory.dtype)
    dtype = choose_dtype(asked, device)
    part = family.spec.parts(family.options)[0]
    sketched = Sketched(family, part, family.stride(), dtype)
    items = find_items(config, family).items
    shape = largest(
        [Shape(item.size, config.data.batch_size, item.condition_sizes) for item in items], sketched
    )
    reckoning = Reckoning(config, sketched, shape, asked_base(config))
    plans: list[tuple[Machine, Plan | UserError]] = []
    for machine in on:
        try:
            plans.append((machine, reckoning.plan(machine)))
        except UserError as error:
            plans.append((machine, error))
    kind: Kind = "fp8" if memory.encoder_base == "fp8" else "int8"
    looked = (
        look_at(family.encoders(config.model.task), dtype, kind, shape.size) if device.type == "cuda" else ()
    )
    return {
        "what": f"{family.spec.title} ({path})",
        "encoders": [
            chosen(looked, memory.encoder_base, dtype, one.vram_bytes, one.link_bytes_per_s) for one in on
        ],
        "shape": str(shape),
        "steps": config.run.steps if config.run.epochs is None else None,
        "plans": plans,
    }


def of_family(
    text: str, size: Size | None, task: str | None, on: Sequence[Machine], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The same of a released model: FAMILY or FAMILY:VARIANT at its usual settings; overrides: KEY=VALUE of the config."""
    name, _, variant = text.partition(":")
    spec = registry.spec(name)
    if task is not None and task not in spec.tasks:
        raise UserError(
            "{title} has no task '{task}' here",
            where="--task",
            mend="use one of: {tasks}",
            title=spec.title,
            task=task,
            tasks=", ".join(spec.tasks),
        )
    if variant in spec.variants and task is not None and task not in spec.tasks_of(variant):
        raise UserError(
            "{title} {variant} has no task '{task}'",
            where="--task",
            mend="use one of: {tasks}",
            title=spec.title,
            variant=variant,
            task=task,
            tasks=", ".join(spec.tasks_of(variant)),
        )
    found = plan_released(name, variant or None, on, _trained_at(size, spec.stride_px), task, overrides)
    return {
        "what": found.title,
        "shape": str(found.shape),
        "steps": None,
        "plans": found.plans,
        "encoders": found.encoders,
    }


def _trained_at(size: Size | None, stride_px: int) -> Size | None:
    """The size that pictures of this one are cut to for training. Raises UserError for one that none can have."""
    if size is None:
        return None
    if not all(stride_px <= side <= _LARGEST_PX for side in (size.width, size.height)):
        raise UserError(
            "{width}x{height} is no size to train at",
            where="--size",
            mend="give sides from {stride} to {largest} pixels",
            width=size.width,
            height=size.height,
            stride=stride_px,
            largest=_LARGEST_PX,
        )
    return size._replace(
        width=size.width // stride_px * stride_px, height=size.height // stride_px * stride_px
    )


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    """The plans as plain values for JSON; a card that is too small has the reason under "refused"."""
    rows = []
    for (machine, plan), encoding in zip(found["plans"], found["encoders"]):
        row: dict[str, Any] = {"card": machine.name, "vram_gb": round(machine.vram_bytes / GIB, 2)}
        row |= {"refused": str(plan)} if isinstance(plan, UserError) else plan.to_json()
        rows.append({**row, "encoders": encoding.to_json()})
    return {key: found[key] for key in ("what", "shape", "steps")} | {"plans": rows}


def as_text(found: dict[str, Any], verbose: bool) -> str:
    """One card: its plan in sentences; several: a line each."""
    lines = [f"{found['what']} at {found['shape']}, in predictions:"]
    plans = found["plans"]
    for (machine, plan), encoding in zip(plans, found["encoders"]):
        head = f"{machine.vram_bytes / GIB:.0f} GB" if len(plans) > 1 else ""
        if isinstance(plan, UserError):
            lines.append(f"{head}  does not fit: {plan}".strip())
        elif len(plans) > 1:
            lines.append(f"{head}  {plan.best.sentence()}")
        else:
            lines += plan.words()
            if found["steps"]:
                lines.append(f"{found['steps']} steps: about {_time(found['steps'] * plan.best.seconds)}")
        lines += [f"{'      ' if len(plans) > 1 else ''}{one}" for one in encoding.words()]
        if verbose and isinstance(plan, Plan):
            lines += [f"      {line}" for choice in plan.choices for line in _table(choice)]
    if len(plans) > 1:
        lines.append("more of one card: --vram GB; speeds are those assumed for a usual card of that size")
    return "\n".join(lines)


def _table(choice: Choice) -> list[str]:
    rows = [f"{choice.base}, {choice.streamed} of {choice.blocks} blocks streamed:"]
    rows += [f"  {size / GIB:6.2f} GB  {name}" for name, size in choice.parts.items() if size > 0]
    return [
        *rows,
        f"  {choice.peak_bytes / GIB:6.2f} GB  at most, {choice.host_bytes / GIB:.1f} GB on the host",
    ]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
