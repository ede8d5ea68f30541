"""Validation: the loss on fixed pictures at fixed noise and a fixed grid of noise levels, so that only learning moves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from whitetuner.diffusion.sigmas import draw_noise, generator_for
from whitetuner.family import Family
from whitetuner.records import Batch
from whitetuner.train.step import StepSettings, loss_at


@dataclass(frozen=True)
class ValidationLoss:
    """loss: mean over pictures and noise levels; by_sigma: noise level -> mean over pictures; by_item: id -> mean over levels."""

    loss: float
    by_sigma: dict[float, float]
    by_item: dict[str, float]


def sigma_grid(count: int, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Midpoints of `count` equal parts of [low, high]."""
    return [round(low + (high - low) * (index + 0.5) / count, 6) for index in range(count)]


@torch.no_grad()
def validate(
    family: Family,
    modules: Mapping[str, torch.nn.Module],
    part: str,
    batches: Sequence[Batch],
    grid: Sequence[float],
    settings: StepSettings,
    device: torch.device,
) -> ValidationLoss:
    """Unweighted loss of `batches` at every noise level of the grid; noise depends on the picture alone."""
    sums = dict.fromkeys(grid, 0.0)
    by_item: dict[str, float] = {}
    count = 0
    for batch in batches:
        x0 = batch["latent"]
        noise = torch.stack(
            [
                draw_noise(tuple(x0[i].shape), generator_for(settings.seed, item.id, 0, "validation"), 0.0)
                for i, item in enumerate(batch.items)
            ]
        )
        count += len(batch)
        for sigma in grid:
            levels = torch.full((len(batch),), sigma)
            loss = loss_at(family, modules, part, batch, levels, noise, settings, device)
            sums[sigma] += float(loss.plain.sum())
            for item, one in zip(batch.items, loss.plain.tolist()):
                by_item[item.id] = by_item.get(item.id, 0.0) + one / len(grid)
    by_sigma = {sigma: total / max(1, count) for sigma, total in sums.items()}
    return ValidationLoss(sum(by_sigma.values()) / len(by_sigma), by_sigma, by_item)
