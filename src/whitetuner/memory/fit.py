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
from whitetuner.memory.machine import GIB
from whitetuner.memory.micro import MicroBatches
from whitetuner.memory.offload import InputsOnHost
from whitetuner.memory.recompute import Recompute, checkpoint_blocks
from whitetuner.memory.swap.arena import Arena
from whitetuner.memory.swap.backend import Backend, Counters, CpuBackend
from whitetuner.memory.swap.device import DeviceBackend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.layout import spread
from whitetuner.memory.swap.retry import shrink, with_room
from whitetuner.memory.swap.shelf import Shelf

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Fitted:
    """What was put on a module, to be taken off again.

    engine: None while all blocks are resident
    swap:   the backend that blocks are streamed with once memory runs out; None: the device has no second memory
    tell:   hears, in a sentence, when blocks leave the device for want of memory
    shelf:  where the blocks wait while another model has its turn; None: in host memory
    trained: the blocks' own weights train, and move
    """

    module: nn.Module
    block_lists: Sequence[str]
    recompute: Recompute
    compiled: Compiled | None
    engine: SwapEngine | None
    swap: Backend | None = None
    tell: Callable[[str], None] = log.warning
    shelf: Shelf | None = None
    trained: bool = False

    @property
    def sharded(self) -> bool:
        """Whether every pass is made by all ranks together (memory/shard.py)."""
        return False

    def run(self, step: Callable[[], T], forget: Callable[[], None]) -> T:
        """A whole optimizer step without the optimizer's; again with fewer residents when memory runs out."""
        if self.engine is None and self.swap is not None:
            try:
                return step()
            except torch.OutOfMemoryError:
                pass  # the traceback, which holds the broken step's tensors, must be gone before blocks leave
            forget()
            count = len(self.recompute.runs)
            self.engine = SwapEngine(
                self.module, self.block_lists, count, self.swap, trained=self.trained
            ).attach()
            shrink(self.engine, self.tell)
        return step() if self.engine is None else with_room(step, self.engine, forget, self.tell)

    def correct(self, free_bytes: int) -> None:
        """Blocks come to the device, or leave it, by what the first steps left free of what the plan allowed.

        free_bytes: beside the peak that was seen; negative when it was above the plan. Changes no bit of a result.
        """
        if self.engine is None:
            return
        sizes = [layout.num_bytes for layout in self.engine.layouts]
        before = self.engine.residents
        held = sum(sizes[index] for index in before)
        residents = spread(sizes, max(0, held + free_bytes))
        if len(residents) == len(before):
            return
        self.engine.resize(residents)
        self.tell(
            f"{len(sizes) - len(residents)} blocks wait on the host from now on, {len(sizes) - len(before)} by the plan: the "
            f"first steps left {free_bytes / GIB:+.1f} GB"
        )

    def make_room(self) -> None:
        """Frees the blocks' device memory for other work (a decoder); they come back with the next forward."""
        if self.engine is not None:
            self.engine.evict()

    def make_way(self) -> None:
        """For another model's turn: as make_room, and with a shelf the blocks leave host memory, too."""
        if self.engine is not None and self.shelf is not None:
            self.engine.park(self.shelf)
        else:
            self.make_room()

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
    inputs_on_host: bool = False,
    micro: MicroBatches | None = None,
    compiled: bool = False,
    attention: str = "auto",
    slots: int = 2,
    movable: bool = False,
    trained: bool = False,
    backend: Backend | None = None,
    tell: Callable[[str], None] = log.warning,
    shelf: Shelf | None = None,
    arena: Arena | None = None,
) -> Fitted:
    """Makes a module, with its adapters or with its own weights training, ready for a device.

    residents: blocks that stay on the device (plan.Choice.residents); None: all, without a swap engine
    plain:     blocks that are not computed again (plan.Choice.plain)
    micro:     a batch goes through each block in pieces
    movable:   another model takes turns with this one on the device: its blocks can leave as a whole (make_room), even
               where all of them stay while it runs
    trained:   the module's own weights train (those with requires_grad), and move with their blocks
    backend:   of the swap; None: the device's own
    tell:      hears of blocks that leave the device later, for want of memory
    shelf:     of a movable one, see Fitted
    arena:     of the blocks that wait on the host, shared with other processes
    The module may lie on the host; what has to be on the device is brought there.
    """
    device = torch.device(device)
    set_attention(module, attention)
    kernels = compile_blocks(module, block_lists) if compiled else None
    kept = frozenset(plain)
    offload = InputsOnHost(device) if inputs_on_host else None
    again = frozenset(range(len(blocks_of(module, block_lists)))) - kept
    saving = offload.saving if offload is not None else nullcontext
    recompute = checkpoint_blocks(module, block_lists, again, keep_inputs=saving, micro=micro)
    engine = None
    stays = None if residents is None else frozenset(residents)
    if movable and stays is None and (backend is not None or device.type != "cpu"):
        stays = frozenset(range(len(recompute.runs)))
    streams = stays is not None and (movable or len(stays) < len(recompute.runs))
    # On a CPU nothing is streamed unless asked for: running out of memory there is no OutOfMemoryError.
    swap = backend or (backend_for(device) if streams or device.type != "cpu" else None)
    if streams and stays is not None and swap is not None:
        engine = SwapEngine(module, block_lists, stays, swap, slots=slots, trained=trained).attach(arena)
        log.info(engine.pinned)
    if engine is None:
        module.to(device)
    return Fitted(module, tuple(block_lists), recompute, kernels, engine, swap, tell, shelf, trained)
