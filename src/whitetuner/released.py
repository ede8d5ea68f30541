"""Plans of released models without their files: from the configs that each family's sketch.py holds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from whitetuner.config.load import load_config
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.family import Family, ModelPaths
from whitetuner.memory.machine import Machine
from whitetuner.memory.plan import Plan
from whitetuner.planning import Reckoning, Shape, Sketched
from whitetuner.records import Size


def released(name: str, variant: str | None, folder: Path) -> tuple[Family, str]:
    """(family, variant) over the released configs alone, written into `folder`. Raises UserError for an unknown variant."""
    spec, known = registry.spec(name), registry.sketch(name).RELEASED
    variant = variant or next(iter(known))
    if variant not in known:
        raise UserError(
            "no released {title} is called '{variant}'",
            where=f"{name}:{variant}",
            mend="use one of: {known}",
            title=spec.title,
            variant=variant,
            known=", ".join(f"{name}:{one}" for one in known),
        )
    single = {}
    for part, config in known[variant].items():
        single[part] = folder / part
        single[part].mkdir(parents=True)
        (single[part] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options = {"variant": variant} if "variant" in spec.options.model_fields else {}
    return registry.load(name, spec.options(**options), ModelPaths(None, single)), variant


@dataclass(frozen=True)
class Released:
    """Plans of a released model at its usual settings, one a machine: a plan, or why there is none."""

    title: str
    shape: Shape
    plans: tuple[tuple[Machine, Plan | UserError], ...]


def plan_released(
    name: str,
    variant: str | None,
    machines: Sequence[Machine],
    size: Size | None = None,
    task: str | None = None,
) -> Released:
    """From the family's released configs alone: no files, no weights. size: None: the family's own."""
    spec = registry.spec(name)
    with tempfile.TemporaryDirectory(prefix="whitetuner-plan-") as folder:
        family, variant = released(name, variant, Path(folder))
        task = task or spec.tasks_of(variant)[0]
        values = {"run.name": "plan", "model.family": name, "model.task": task, "model.path": folder}
        config = load_config(None, base=values).config
        stride = spec.variant_strides.get(variant, spec.stride_px)
        sketched = Sketched(family, spec.parts(family.options)[0], stride, torch.bfloat16)
        size = size or spec.default_size
        given = (size._replace(frames=1),) if task in ("edit", "i2v") else ()
        shape = Shape(size, config.data.batch_size, given)
        reckoning = Reckoning(config, sketched, shape)
    found: list[tuple[Machine, Plan | UserError]] = []
    for machine in machines:
        try:
            found.append((machine, reckoning.plan(machine)))
        except UserError as error:
            found.append((machine, error))
    turns = ", its experts in turns" if len(spec.parts(family.options)) > 1 else ""
    return Released(f"{spec.title} {variant} ({task}){turns}", shape, tuple(found))
