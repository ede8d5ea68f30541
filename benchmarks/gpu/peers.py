"""The engines of other trainers, imported from checkouts of their own that the user has: `--peers DIR`.

DIR holds any of musubi-tuner, OneTrainer, ai-toolkit, as git clones them. Nothing of them is part of this
project; each adapter calls what the trainer itself calls (seen at musubi-tuner 30c658c, OneTrainer 23df383,
ai-toolkit 27a03a9). What a checkout needs beyond our own packages is told by its ImportError.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.engines import CannotDo, Held, Job
from torch import nn

from whitetuner.memory.blocks import blocks_of


def peers(folder: Path) -> dict[str, Callable[[Job], Held]]:
    """Engines of the checkouts that are there, by name."""
    found: dict[str, Callable[[Job], Held]] = {}
    if (musubi := folder / "musubi-tuner" / "src").is_dir():
        found["musubi h2d-only"] = lambda job: _musubi(musubi, job, h2d_only=True)
        found["musubi classic"] = lambda job: _musubi(musubi, job, h2d_only=False)
    if (one := folder / "OneTrainer").is_dir():
        found["OneTrainer"] = lambda job: _onetrainer(one, job)
    if (kit := folder / "ai-toolkit").is_dir():
        found["ai-toolkit"] = lambda job: _aitoolkit(kit, job)
    return found


def _import(root: Path, name: str) -> Any:
    if str(root) not in sys.path:
        sys.path.append(str(root))
    return import_module(name)


def _rest_to(job: Job, stay: Iterable[torch.Tensor]) -> None:
    """Everything but `stay` goes to the device, as these engines expect."""
    waiting = {id(tensor) for tensor in stay}
    for tensor in (*job.module.parameters(), *job.module.buffers()):
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(job.device)


class _Turn(nn.Module):
    """A block between the two calls that musubi's models make around it; its inputs go in by position, because
    its backward hooks see no others."""

    def __init__(self, block: nn.Module, index: int, offloader: Any, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.block, self.index = block, index
        self._offloader, self._blocks = offloader, blocks
        self._signature = inspect.signature(type(block).forward)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models look into their blocks
            return getattr(self.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(self.block, *args, **kwargs)
        bound.apply_defaults()
        self._offloader.wait_for_block(self.index)
        out = self.block(*bound.args[1:], **bound.kwargs)
        self._offloader.submit_move_blocks_forward(self._blocks, self.index)
        return out


def _musubi(root: Path, job: Job, *, h2d_only: bool) -> Held:
    """One offloader for each block list, pinned; each list gets its share of the room."""
    module = _import(root, "musubi_tuner.modules.custom_offloading_utils")
    if job.device.type != "cuda":
        raise CannotDo("musubi's offloaders need CUDA")
    if h2d_only and not job.recompute:
        raise CannotDo("musubi's h2d-only mode refuses to run without checkpointing")
    job.checkpoint()
    share, taken, done = job.room_bytes / sum(job.sizes), 0, 0
    linears = [
        m.weight for _, b in blocks_of(job.module, job.lists) for m in b.modules() if isinstance(m, nn.Linear)
    ]
    _rest_to(job, linears)
    config = module.BlockSwapConfig(job.device, True, use_pinned_memory=True, h2d_only=h2d_only)
    for name in job.lists:
        blocks = list(job.module.get_submodule(name).children())  # type: ignore[union-attr]
        count, size = len(blocks), job.sizes[done]
        done += count
        kept = int(count * share) - (2 if h2d_only else 0)
        swap = max(1, min(count - 2, count - kept)) if count > 2 else 0
        if swap == 0:
            for block in blocks:
                block.to(job.device)
            taken += count * size
            continue
        offloader = module.create_offloader(name, blocks, count, swap, config)
        offloader.prepare_block_devices_before_forward(blocks)
        turns = [_Turn(block, index, offloader, blocks) for index, block in enumerate(blocks)]
        parent, _, last = name.rpartition(".")
        setattr(job.module.get_submodule(parent), last, nn.ModuleList(turns))
        taken += size * (count - swap + (min(2, swap) if h2d_only else 0))
    return Held(job.module, taken)


def _onetrainer(root: Path, job: Job) -> Held:
    """Its conductor with its own checkpoints (reentrant), asynchronous; the fraction that leaves this room."""
    if not job.recompute:
        raise CannotDo("OneTrainer's offloading needs checkpointing")
    config = _import(root, "modules.util.config.TrainConfig").TrainConfig.default_values()
    config.train_device, config.temp_device = str(job.device), "cpu"
    part = config.transformer
    part.gradient_checkpointing, part.activation_offloading = True, False
    part.offload_fraction = 1.0 - min(1.0, job.room_bytes / sum(job.sizes))
    checkpointing = _import(root, "modules.util.checkpointing_util")
    lists = [(job.module.get_submodule(name), []) for name in job.lists]
    conductor = checkpointing.enable_checkpointing(job.module, config, part, False, lists)
    if conductor is None:
        raise CannotDo("nothing is left to offload")
    conductor.materialize()
    _rest_to(job, [t for _, block in blocks_of(job.module, job.lists) for t in block.parameters()])
    return Held(job.module, job.room_bytes)


def _aitoolkit(root: Path, job: Job) -> Held:
    """Its memory manager on every linear of the blocks, the share of them that leaves this room (by lot)."""
    manager = _import(root, "toolkit.memory_management").MemoryManager
    job.checkpoint()
    blocks = [block for _, block in blocks_of(job.module, job.lists)]
    managed = [m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    _rest_to(job, managed)
    outside = [
        m
        for m in job.module.modules()
        if isinstance(m, nn.Linear) and all(m.weight is not w for w in managed)
    ]
    share = 1.0 - min(1.0, job.room_bytes / sum(job.sizes))
    manager.attach(job.module, job.device, offload_percent=share, ignore_modules=outside)
    job.module.to(job.device)
    return Held(job.module, int((1 - share) * sum(job.sizes)), release=lambda: manager.detach(job.module))
