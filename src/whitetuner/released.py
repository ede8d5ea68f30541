"""Plans of released models without their files: from the configs that each family's sketch.py holds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whitetuner.config.full import dtype_wanted, refuse_wrong_full
from whitetuner.config.load import load_config
from whitetuner.encoding import Encoding, chosen, look_at
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.family import Family, ModelPaths
from whitetuner.memory.machine import Machine
from whitetuner.memory.plan import Plan
from whitetuner.planning import Reckoning, Shape, Sketched, asked_base
from whitetuner.records import Size
from whitetuner.resolve import choose_dtype


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
    encoders: Mapping[str, Mapping[str, Mapping[str, Any]]] = getattr(registry.sketch(name), "ENCODERS", {})
    more = {part: config for one in encoders.values() for part, config in one.items()}
    for part, config in {**known[variant], **more}.items():
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
    encoders: tuple[Encoding, ...]


def plan_released(
    name: str,
    variant: str | None,
    machines: Sequence[Machine],
    size: Size | None = None,
    task: str | None = None,
    overrides: Sequence[str] = (),
) -> Released:
    """From the family's released configs alone: no files, no weights. size: None: the family's own.

    overrides: KEY=VALUE of the config. Raises UserError for what it cannot take.
    """
    spec = registry.spec(name)
    with tempfile.TemporaryDirectory(prefix="whitetuner-plan-") as folder:
        family, variant = released(name, variant, Path(folder))
        task = task or spec.tasks_of(variant)[0]
        values = {"run.name": "plan", "model.family": name, "model.task": task, "model.path": folder}
        config = load_config(None, overrides, base=values).config
        refuse_wrong_full(config)
        stride = spec.variant_strides.get(variant, spec.stride_px)
        # As on a card: what `auto` comes to there.
        dtype = choose_dtype(dtype_wanted(config) or config.memory.dtype, torch.device("cuda"))
        sketched = Sketched(family, spec.parts(family.options)[0], stride, dtype)
        size = size or spec.default_size
        given = (size._replace(frames=1),) if task in ("edit", "i2v") else ()
        shape = Shape(size, config.data.batch_size, given)
        reckoning = Reckoning(config, sketched, shape, asked_base(config))
        known = getattr(registry.sketch(name), "ENCODERS", {})
        looked = look_at(
            [one for one in family.encoders(task) if one.name in known], torch.bfloat16, "int8", shape.size
        )
    found: list[tuple[Machine, Plan | UserError]] = []
    for machine in machines:
        try:
            found.append((machine, reckoning.plan(machine)))
        except UserError as error:
            found.append((machine, error))
    encoders = tuple(
        chosen(looked, "auto", torch.bfloat16, one.vram_bytes, one.link_bytes_per_s) for one in machines
    )
    title = f"{spec.title} {variant} ({task})"
    title = f"{title}, its experts in turns" if len(spec.parts(family.options)) > 1 else title
    return Released(title, shape, tuple(found), encoders)
