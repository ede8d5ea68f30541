"""The denoiser that does not learn where two draw together: WAN 2.2 with one expert in training needs the other for previews.

It is read at the first preview, on a card as int8 and streamed where it does not fit, and only where the host has the room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial

import psutil
from torch import nn

from whitetuner.config.schema import Config
from whitetuner.families import registry
from whitetuner.family import Family
from whitetuner.memory.build import Build
from whitetuner.memory.machine import GIB
from whitetuner.memory.phases import PhaseBuild, device_budget
from whitetuner.memory.plan import weigh
from whitetuner.memory.quantize import Kind
from whitetuner.memory.skeleton import sketch_module
from whitetuner.resolve import Resolved

#: Of the host's free memory; the rest is for the pages of files, the decoder and the user.
_SHARE = 0.8


class Companion:
    """The parts of a family that do not learn, for drawing. tell: hears when they are read."""

    def __init__(
        self, family: Family, resolved: Resolved, limit_gb: float | None, tell: Callable[[str], None]
    ) -> None:
        self.family, self.resolved, self.limit_gb, self.tell = family, resolved, limit_gb, tell
        self.quantize: Kind | None = "int8" if resolved.device.type == "cuda" else None
        self._lists = family.spec.parts(family.options)[0].block_lists
        self._builds: list[PhaseBuild] = []

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
        sketches = self.family.load(partial(sketch_module, dtype=self.resolved.dtype, quantize=self.quantize))
        weights = [weigh(module, self._lists) for module in sketches.values()]
        return sum(one.rest + sum(one.blocks) for one in weights)

    def make_room(self) -> None:
        """Its streamed blocks leave the card; they come back when it is called."""
        for build in self._builds:
            for engine in build.engines:
                engine.evict()


def companion_of(
    config: Config, family: Family, resolved: Resolved, tell: Callable[[str, str], None]
) -> Companion | None:
    """What previews need besides the parts that learn; None when nothing is, when there are no previews, or no memory for it.

    tell: (level, text). Without it such a family draws no previews, and this says so.
    """
    rest = family.spec.unlearned(family.options)
    if rest is None or not config.preview.every or not config.preview.prompts:
        return None
    other = registry.load(family.spec.name, rest, family.paths)
    found = Companion(other, resolved, config.memory.limit_gb, lambda text: tell("info", text))
    need, free = found.num_bytes(), psutil.virtual_memory().available
    if need > _SHARE * free:
        tell(
            "warning",
            f"no previews: they need the other expert too, {need / GIB:.1f} GB of host memory, and {free / GIB:.1f} GB are free",
        )
        return None
    return found
