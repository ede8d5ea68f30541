"""What two runs are compared by: every tensor of a checkpoint, every loss, as one hash. For selftest and the tests."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from whitetuner.adapters.attach import Adapter
from whitetuner.checkpoint.store import read
from whitetuner.diffusion.sigmas import SigmaSettings
from whitetuner.family import BuildFn, Family
from whitetuner.paths import PYTHON
from whitetuner.records import Batch
from whitetuner.runs import events
from whitetuner.train.step import StepSettings, step_loss


def gradients(
    family: Family, part: str, module: torch.nn.Module, adapter: Adapter, batches: Sequence[Batch], seed: int
) -> dict[str, torch.Tensor]:
    """Gradient of every trained tensor after these micro-batches, as a step of the loop accumulates them."""
    settings, device = StepSettings(seed, SigmaSettings()), torch.device("cpu")
    samples = sum(len(batch) for batch in batches)
    for batch in batches:
        (step_loss(family, {part: module}, part, batch, settings, device).weighted.sum() / samples).backward()
    found = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    for parameter in adapter.parameters():
        parameter.grad = None
    return found


@torch.no_grad()
def begins_as(
    ours: Family, build: BuildFn, theirs: Family, batch: Batch, *, tolerance: float
) -> tuple[float, int, int]:
    """How far a model that is converted while it loads is from the one in its folder, before anything is trained.

    (error relative to the velocity, tensors of the converted model that were disturbed one at a time, how many of those
    disturbances were seen). A comparison that does not see all of them proves nothing.
    """
    part = ours.spec.parts(ours.options)[0].name
    x0 = batch["latent"]
    assert isinstance(x0, torch.Tensor)
    x_t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.9, 0.2, len(x_t))
    wanted = theirs.predict(theirs.load(build), part, batch, x_t, sigma)
    modules = ours.load(build)

    def error() -> float:
        return float((ours.predict(modules, part, batch, x_t, sigma) - wanted).norm() / wanted.norm())

    found, seen, tensors = error(), 0, list(modules[part].parameters())
    for index, tensor in enumerate(tensors):
        before = tensor.clone()
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)), alpha=0.1)
        seen += error() > tolerance
        tensor.copy_(before)
    return found, len(tensors), seen


def start_training(config: Path, *more: str) -> subprocess.Popen[bytes]:
    """`whitetuner train` as a process of its own, silent."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*PYTHON, "-m", "whitetuner", "train", str(config), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env=environment,
    )


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, named by file and key."""
    found = read(folder / "checkpoints" / f"checkpoint-{step}")
    return {f"{file}:{key}": tensor for file, group in found.tensors.items() for key, tensor in group.items()}


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """What a run says of every step, times aside."""
    found, _ = events.read(folder / "events.jsonl")
    return [(e.step, e.loss, e.sigmas, e.losses) for e in found if isinstance(e, events.StepDone)]


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Twelve hex digits that change when a bit, a name or a shape does."""
    found = hashlib.blake2b(digest_size=6)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
