"""Ways to hold a model whose blocks do not all fit: ours, diffusers' group offload, and none at all.

Each puts itself on a module that lies on the host, with so many bytes of the card for weights of blocks, and
recomputes blocks as asked; engines of other trainers: peers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from whitetuner.memory.plan import SLOTS
from whitetuner.memory.recompute import checkpoint_blocks
from whitetuner.memory.swap.backend import Backend, CpuBackend
from whitetuner.memory.swap.device import DeviceBackend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.layout import slot_bytes, spread


@dataclass
class Job:
    """room_bytes: of the card for weights of blocks;  sizes: bytes of the blocks that can move;  residents, slots,
    plain: of a plan, where one decides."""

    module: nn.Module
    lists: tuple[str, ...]
    device: torch.device
    sizes: tuple[int, ...]
    room_bytes: int
    recompute: bool
    residents: frozenset[int] | None = None
    slots: int | None = None
    plain: frozenset[int] | None = None

    def checkpoint(self) -> None:
        """Our per-block checkpoints, for the engines that bring none of their own."""
        plain = (
            self.plain
            if self.plain is not None
            else frozenset(() if self.recompute else range(len(self.sizes)))
        )
        checkpoint_blocks(self.module, self.lists, frozenset(range(len(self.sizes))) - plain)


def _nothing() -> dict[str, Any]:
    return {}


@dataclass
class Held:
    """What an engine did. weight_bytes: of the card that it takes for weights of blocks, as far as is known;
    counters: what was moved since the last call."""

    module: nn.Module
    weight_bytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    counters: Callable[[], dict[str, Any]] = _nothing
    before_step: Callable[[], None] = lambda: None
    release: Callable[[], None] = lambda: None


class CannotDo(Exception):
    """An engine does not do what a case asks for: a result of the comparison, not an error."""


def resident(job: Job) -> Held:
    """All blocks on the card."""
    job.module.to(job.device)
    job.checkpoint()
    return Held(job.module, sum(job.sizes))


def ours(job: Job) -> Held:
    """SwapEngine, with residents and slots as the plan spends this room."""
    residents, slots = job.residents, job.slots
    if residents is None:
        one = slot_bytes(job.sizes)
        slots = SLOTS if job.room_bytes >= SLOTS * one else 2
        residents = spread(job.sizes, max(0, job.room_bytes - slots * one))
    job.checkpoint()
    backend: Backend = (
        CpuBackend(None, poison=False) if job.device.type == "cpu" else DeviceBackend(job.device)
    )
    engine = SwapEngine(job.module, job.lists, residents, backend, slots=slots or 2).attach()

    def counters() -> dict[str, Any]:
        done = engine.step_end()
        return {
            "loads": done.loads,
            "bytes_up": done.bytes_up,
            "demanded": done.demanded,
            "copies_back": done.copies_back,
        }

    facts = {"residents": len(engine.residents), "slots": engine.slots, "pinned": engine.pinned}
    return Held(job.module, engine.placement.device_bytes, facts, counters, release=engine.detach)


def diffusers_offload(job: Job) -> Held:
    """enable_group_offload, one block a group, streams and recorded prefetch: keeps no block."""
    if not hasattr(job.module, "enable_group_offload"):
        raise CannotDo("this module has no enable_group_offload")
    if job.device.type != "cuda":
        raise CannotDo("group offload with streams needs CUDA")
    if job.recompute:
        job.module.enable_gradient_checkpointing()  # type: ignore[operator]
    job.module.enable_group_offload(  # type: ignore[operator]
        onload_device=job.device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
    )
    for parameter in job.module.parameters():  # the adapter is in the groups; its gradients stay on the card
        if parameter.requires_grad:
            parameter.data = parameter.data.to(job.device)
    return Held(job.module)


ENGINES: dict[str, Callable[[Job], Held]] = {
    "resident": resident,
    "ours": ours,
    "diffusers group offload": diffusers_offload,
}
