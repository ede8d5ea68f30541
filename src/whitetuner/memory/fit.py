"""Puts a plan on a module: kernels, recomputation, swap, in the order in which they work on one another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from whitetuner.memory.blocks import blocks_of
from whitetuner.memory.kernels import Compiled, compile_blocks, set_attention
from whitetuner.memory.offload import InputsOnHost
from whitetuner.memory.recompute import Recompute, checkpoint_blocks
from whitetuner.memory.swap.backend import Backend, Counters, CpuBackend
from whitetuner.memory.swap.device import DeviceBackend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.retry import with_room

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Fitted:
    """What was put on a module, to be taken off again. engine is None when all blocks are resident."""

    module: nn.Module
    recompute: Recompute
    compiled: Compiled | None
    engine: SwapEngine | None

    def run(self, step: Callable[[], T], forget: Callable[[], None]) -> T:
        """A whole optimizer step without the optimizer's; again with fewer residents when memory runs out."""
        return step() if self.engine is None else with_room(step, self.engine, forget)

    def step_end(self) -> Counters:
        """What moved since the last call."""
        return Counters() if self.engine is None else self.engine.step_end()

    def remove(self) -> None:
        """Leaves the plain module; swapped blocks lie on the host."""
        if self.engine is not None:
            self.engine.detach()
        self.recompute.remove()
        if self.compiled is not None:
            self.compiled.remove()


def backend_for(device: torch.device) -> Backend | None:
    """The swap backend of a device; None where memory is shared with the host, so that swapping would free
    nothing.
    """
    if device.type == "mps":
        log.warning(
            "this device shares its memory with the processor: swapping would free nothing and is left out"
        )
        return None
    return CpuBackend(None, poison=False) if device.type == "cpu" else DeviceBackend(device)


def fit(
    module: nn.Module,
    block_lists: Sequence[str],
    device: torch.device | str,
    *,
    residents: Iterable[int] | None = None,
    plain: Iterable[int] = (),
    slots: int = 2,
    inputs_on_host: bool = False,
    compiled: bool = False,
    attention: str = "auto",
    backend: Backend | None = None,
) -> Fitted:
    """Makes a module with its adapters ready to train on a device.

    residents: blocks that stay on the device (plan.Choice.residents); None: all, without a swap engine
    plain:     blocks that are not computed again (plan.Choice.plain)
    backend:   of the swap; None: the device's own
    The module may lie on the host; what has to be on the device is brought there.
    """
    device = torch.device(device)
    set_attention(module, attention)
    kernels = compile_blocks(module, block_lists) if compiled else None
    kept = frozenset(plain)
    offload = InputsOnHost(device) if inputs_on_host else None
    again = frozenset(range(len(blocks_of(module, block_lists)))) - kept
    saving = offload.saving if offload is not None else nullcontext
    recompute = checkpoint_blocks(module, block_lists, again, keep_inputs=saving)
    engine = None
    stays = None if residents is None else frozenset(residents)
    if stays is not None and len(stays) < len(recompute.runs):
        swap = backend or backend_for(device)
        if swap is not None:
            engine = SwapEngine(module, block_lists, stays, swap, slots=slots).attach()
            log.info(engine.pinned)
    if engine is None:
        module.to(device)
    return Fitted(module, recompute, kernels, engine)
