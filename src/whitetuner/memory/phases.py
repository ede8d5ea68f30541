"""Models of the other phases, too: a text encoder larger than the card is streamed block by block, to the same bits.

Encoders run once over every caption and are freed; they have no plan of their own. What fits is simply built on the device.
What does not waits on the host, and its longest list of blocks takes turns in two slots (swap/engine.py, the same that
trains).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.memory.build import Build
from whitetuner.memory.fit import backend_for
from whitetuner.memory.machine import GIB
from whitetuner.memory.quantize import Kind
from whitetuner.memory.skeleton import sketch_module
from whitetuner.memory.swap.backend import Backend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.layout import slot_bytes, spread
from whitetuner.memory.weigh import Weights, weigh

log = logging.getLogger(__name__)
#: Left free for activations and kernels while a model of another phase runs.
ROOM_BYTES = int(1.5 * GIB)


class PhaseBuild:
    """A BuildFn for one phase: `build(cls, folder, keep_precise=...)`.

    budget_bytes: device memory that a model and its activations may take; None: whatever it takes
    block_lists:  of the model, where the caller knows them; None: its longest list of blocks
    together:     the models made are used side by side; else the one before gives its memory back first
    backend:      of the swap
    """

    def __init__(
        self,
        build: Build,
        budget_bytes: int | None = None,
        *,
        block_lists: Sequence[str] | None = None,
        room_bytes: int = ROOM_BYTES,
        together: bool = False,
        backend: Callable[[torch.device], Backend | None] = backend_for,
        tell: Callable[[str], None] = log.info,
    ) -> None:
        self.build, self.budget_bytes, self.block_lists = build, budget_bytes, block_lists
        self.together = together
        self.room_bytes, self.backend, self.tell = room_bytes, backend, tell
        self.engines: list[SwapEngine] = []

    def __call__(
        self, cls: type, folder: Path, *, keep_precise: Sequence[str] = (), quantize: Kind | None = None
    ) -> Any:
        """quantize: of this model, where that is not the build's own."""
        if not self.together:
            self.release()
        build = self.build if quantize is None else replace(self.build, quantize=quantize)
        if self.budget_bytes is None:
            return build(cls, folder, keep_precise=keep_precise)
        sketch = sketch_module(
            cls, folder, keep_precise=keep_precise, dtype=build.dtype, quantize=build.quantize
        )
        lists = self.block_lists or longest_list(sketch)
        if not lists:
            return build(cls, folder, keep_precise=keep_precise)
        weights = weigh(sketch, lists)
        residents = self._residents(weights, folder)
        swap = None if residents is None else self.backend(torch.device(build.device))
        if residents is None or swap is None:
            return build(cls, folder, keep_precise=keep_precise)
        host = [f"{name}.*" for name in lists]
        module = replace(build, host=host)(cls, folder, keep_precise=keep_precise)
        self.engines.append(SwapEngine(module, lists, residents, swap).attach())
        self.tell(
            f"{folder.name} is larger than the card's memory: {len(weights.blocks) - len(residents)} of its "
            f"{len(weights.blocks)} blocks are streamed"
        )
        return module

    def _residents(self, weights: Weights, folder: Path) -> frozenset[int] | None:
        """Blocks that stay; None when all do. Raises UserError when even two blocks at a time are too much."""
        assert self.budget_bytes is not None
        held = held_within(weights, self.budget_bytes, self.room_bytes)
        if held.needed_bytes > self.budget_bytes:
            raise UserError(
                "{part} needs {need:.1f} GB on the card though its blocks are streamed, and {have:.1f} GB may be used",
                where="memory.vram_gb",
                mend="free memory on the card (other programs use it too), raise memory.vram_gb, or use "
                'memory.device = "cpu" for the caching (`whitetuner cache`)',
                code=EXIT_ENVIRONMENT,
                part=folder.name,
                need=held.needed_bytes / GIB,
                have=self.budget_bytes / GIB,
            )
        return held.residents

    def release(self) -> None:
        """Gives back what streamed models hold; they are unusable on the device after. Safe to call twice."""
        for engine in self.engines:
            engine.detach()
        self.engines = []


@dataclass(frozen=True)
class Held:
    """How a model of a phase lies in a budget. residents: blocks that stay, None: all;  needed_bytes: at the very least."""

    residents: frozenset[int] | None
    needed_bytes: int


def held_within(weights: Weights, budget_bytes: int, room_bytes: int = ROOM_BYTES) -> Held:
    """Whole where that fits, else with as many blocks as fit beside two slots that the others take turns in."""
    budget = budget_bytes - room_bytes - weights.rest
    whole = sum(weights.blocks)
    if whole <= budget:
        return Held(None, whole + weights.rest + room_bytes)
    slots = 2 * slot_bytes(weights.blocks)
    residents = spread(weights.blocks, budget - slots) if budget >= slots else frozenset()
    return Held(residents, weights.rest + min(slots, whole) + room_bytes)


def device_budget(device: torch.device, vram_gb: float | None) -> int | None:
    """Bytes that a phase may take on a card: what is free, or less where less is allowed; None on a CPU."""
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free if vram_gb is None else min(free, int(vram_gb * GIB))


def longest_list(module: nn.Module) -> tuple[str, ...]:
    """(path,) of the outermost ModuleList that holds the most bytes; () when there is none."""
    best: tuple[str, ...] = ()
    most = 0
    for path, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            size = sum(p.numel() * p.element_size() for p in child.parameters())
            if size > most:
                best, most = (path,), size
    return best
