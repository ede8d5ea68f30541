"""The denoiser that does not learn where two draw together: WAN 2.2 with one expert in training needs the other for previews.

It is read at the first preview, on a card as int8 and streamed where it does not fit, and only where the host has the room,
or the disk, where experts wait there for their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path

import psutil
import torch
from torch import nn

from whitetuner.config.schema import Config
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.family import Family
from whitetuner.memory.beside import Beside, exchange_s, turn_steps
from whitetuner.memory.build import Build
from whitetuner.memory.machine import GIB
from whitetuner.memory.phases import PhaseBuild, device_budget
from whitetuner.memory.plan import Plan
from whitetuner.memory.quantize import Kind
from whitetuner.memory.skeleton import sketch_module
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.shelf import Shelf
from whitetuner.memory.weigh import weigh
from whitetuner.resolve import Resolved

#: Of the host's free memory; the rest is for the pages of files, the decoder and the user.
_SHARE = 0.8


class Companion:
    """The parts of a family that do not learn, for drawing. tell: hears when they are read;  shelf_folder: where they wait for
    their turn, None: in host memory."""

    def __init__(
        self,
        family: Family,
        resolved: Resolved,
        limit_gb: float | None,
        tell: Callable[[str], None],
        shelf_folder: Path | None = None,
    ) -> None:
        self.family, self.resolved, self.limit_gb, self.tell = family, resolved, limit_gb, tell
        self.quantize: Kind | None = "int8" if resolved.device.type == "cuda" else None
        self._lists = family.spec.parts(family.options)[0].block_lists
        self._builds: list[PhaseBuild] = []
        self._shelf_folder = shelf_folder
        self._shelves: dict[int, Shelf] = {}

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Part name -> denoiser; read at first use, into what memory is free then."""
        names = ", ".join(part.suffix or part.name for part in self.family.spec.parts(self.family.options))
        self.tell(f"reading the expert that does not learn ({names}), for previews")
        device = self.resolved.device
        build = Build(self.resolved.dtype, device, self.quantize)
        budget = device_budget(device, self.limit_gb)
        self._builds.append(PhaseBuild(build, budget, block_lists=self._lists, together=True, tell=self.tell))
        return self.family.load(self._builds[0])

    def num_bytes(self) -> int:
        """Of its weights as they would be held, from shapes alone."""
        return sum(sum(one) for one in held_bytes(self.family, self.resolved.dtype, self.quantize))

    def make_room(self) -> None:
        """Its streamed blocks leave the card; they come back when it is called."""
        for engine in self._engines():
            engine.evict()

    def make_way(self) -> None:
        """For a learner's turn: as make_room, and with a shelf its streamed blocks leave host memory, too."""
        for engine in self._engines():
            if self._shelf_folder is None:
                engine.evict()
            else:
                engine.park(self._shelves.setdefault(id(engine), Shelf(self._shelf_folder)))

    def _engines(self) -> list[SwapEngine]:
        return [engine for build in self._builds for engine in build.engines]


def held_bytes(family: Family, dtype: torch.dtype, quantize: Kind | None) -> list[tuple[int, int]]:
    """(of the blocks, of all else) of each part, from shapes alone."""
    sketches = family.load(partial(sketch_module, dtype=dtype, quantize=quantize))
    lists = {part.name: part.block_lists for part in family.spec.parts(family.options)}
    weights = [weigh(module, lists[name]) for name, module in sketches.items()]
    return [(sum(one.blocks), one.rest) for one in weights]


def beside_of(config: Config, family: Family, dtype: torch.dtype) -> Beside:
    """What takes turns with the denoiser that learns, on a card: for the plan.

    Raises UserError when experts are to wait on disk and there are none, or all their weights learn.
    """
    parts, on_disk = family.spec.parts(family.options), config.memory.experts_on_disk
    drawing = _drawing(config, family)
    if on_disk is True and len(parts) == 1 and drawing is None:
        raise UserError(
            "no expert waits here that could do so on the disk",
            where="memory.experts_on_disk",
            mend="leave it out; it is for models of two experts (WAN 2.2 A14B): both learning, or one with previews",
        )
    if config.method.kind == "full":  # what a file holds would be old after a turn
        on_disk = False
    return Beside(
        learners=len(parts) - 1,
        drawing_bytes=0
        if drawing is None
        else sum(blocks for blocks, _ in held_bytes(drawing, dtype, "int8")),
        on_disk=None if on_disk == "auto" else on_disk,
    )


def _drawing(config: Config, family: Family) -> Family | None:
    """The family of what previews need besides the parts that learn; None when nothing is, or when there are no previews."""
    rest = family.spec.unlearned(family.options)
    if rest is None or not config.preview.every or not config.preview.prompts:
        return None
    return registry.load(family.spec.name, rest, family.paths)


def turn_steps_of(plan: Plan, config: Config) -> int:
    """Optimizer steps of a turn of one of two learners, by this plan."""
    best, link = plan.best, plan.machine.link_bytes_per_s
    filled = best.parts["resident blocks"] + best.parts["slots"]
    small = best.parts["other weights"] + best.parts["adapter and optimizer"]
    exchange = exchange_s(filled, small, best.disk_bytes // 2, link)
    step_s = best.seconds * config.optimizer.gradient_accumulation
    return turn_steps(exchange, step_s, config.run.steps or 2000)


def companion_of(
    config: Config,
    family: Family,
    resolved: Resolved,
    tell: Callable[[str, str], None],
    shelf_folder: Path | None = None,
    planned: bool = True,
) -> Companion | None:
    """What previews need besides the parts that learn; None when nothing is, when there are no previews, or no memory for it.

    tell: (level, text). Without it such a family draws no previews, and this says so. planned: the plan has room for it
    """
    other = _drawing(config, family)
    if other is None:
        return None
    limit = config.memory.limit_gb
    found = Companion(other, resolved, limit, lambda text: tell("info", text), shelf_folder)
    need, free = found.num_bytes(), psutil.virtual_memory().available
    if not planned or (need > _SHARE * free and shelf_folder is None):
        tell(
            "warning",
            f"no previews: they need the other expert too, {need / GIB:.1f} GB of host memory, and {free / GIB:.1f} GB are free",
        )
        return None
    return found
