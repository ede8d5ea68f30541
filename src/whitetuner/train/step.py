"""One batch -> one loss. Everything random in it is a function of (seed, item id, visit, purpose), drawn on the CPU.

x_t = (1 - sigma) x0 + sigma noise; the model says a velocity; the loss is the squared distance to noise - x0, a mean per
sample first and over the samples after, so that a sample counts the same in every batch (Lipman et al. 2023, arXiv 2210.02747).
A data set's loss_weight is a factor of its samples' losses; what they are divided by is the number of samples all the same, as
for the regularisation pictures of DreamBooth (Ruiz et al. 2022, arXiv 2208.12242, equation 2). Of a sample with a mask the
mean is over what counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from whitetuner.diffusion.loss import LossWeighting, sample_losses, weighting
from whitetuner.diffusion.path import noisy, velocity
from whitetuner.diffusion.sigmas import SigmaSettings, draw_noise, draw_sigma, generator_for, loss_weight
from whitetuner.family import Family
from whitetuner.records import Batch


@dataclass(frozen=True)
class StepSettings:
    """seed: of the run; noise_offset: standard deviation of a constant added to each channel's noise."""

    seed: int
    sigmas: SigmaSettings
    loss_weighting: LossWeighting = "none"
    noise_offset: float = 0.0
    min_snr_gamma: float = 5.0


@dataclass(frozen=True)
class StepLoss:
    """weighted: (B,) float32 with gradient, what is learned from; plain: (B,) without weights (of a masked sample: over what
    counts), what is shown; sigma: (B,)."""

    weighted: torch.Tensor
    plain: torch.Tensor
    sigma: torch.Tensor


def step_loss(
    family: Family,
    modules: Mapping[str, torch.nn.Module],
    part: str,
    batch: Batch,
    settings: StepSettings,
    device: torch.device,
) -> StepLoss:
    """Loss of a batch at freshly drawn noise levels."""
    x0 = batch["latent"]
    assert isinstance(x0, torch.Tensor)
    sigmas, noises = [], []
    for index, (item, visit) in enumerate(zip(batch.items, batch.visits)):
        sigmas.append(draw_sigma(settings.sigmas, generator_for(settings.seed, item.id, visit, "sigma")))
        generator = generator_for(settings.seed, item.id, visit, "noise")
        noises.append(draw_noise(tuple(x0[index].shape), generator, settings.noise_offset))
    return loss_at(family, modules, part, batch, torch.tensor(sigmas), torch.stack(noises), settings, device)


def loss_at(
    family: Family,
    modules: Mapping[str, torch.nn.Module],
    part: str,
    batch: Batch,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    settings: StepSettings,
    device: torch.device,
) -> StepLoss:
    """Loss of a batch at given noise levels. sigma: (B,) float32; noise: like x0, float32."""
    batch = batch.to(device)
    x0 = batch["latent"]
    assert isinstance(x0, torch.Tensor), "the target's latent is a stacked field"
    x0, sigma, noise = x0.float(), sigma.to(device), noise.to(device)
    prediction = family.predict(modules, part, batch, noisy(x0, noise, sigma), sigma)
    mask = batch.fields.get("mask")
    if mask is not None:
        assert isinstance(mask, torch.Tensor), "masks are stacked"
        mask = mask.view(len(mask), *[1] * (x0.ndim - 3), *mask.shape[1:])
    plain = sample_losses(prediction, velocity(x0, noise), mask)
    weights = weighting(settings.loss_weighting, sigma, settings.min_snr_gamma) * loss_weight(
        settings.sigmas, sigma
    )
    weights = weights * torch.tensor([item.loss_weight for item in batch.items], device=device)
    return StepLoss(plain * weights, plain.detach(), sigma.detach())
