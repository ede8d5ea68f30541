"""How far a prediction is from the velocity: mean squared error per sample, weighted by the noise level.

A sample is a mean over its own numbers before it enters the mean over samples, so it counts the same in every
batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

LossWeighting = Literal["none", "sigma_sqrt", "cosmap", "min_snr"]

#: sigma^-2 has no bound; below this noise level the weight stays what it is here (100).
SIGMA_SQRT_FLOOR = 0.1


def sample_losses(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of each sample, (B,), float32. prediction, target: (B, C, ...).

    mask: broadcastable to them, how much each number counts, from 0 to 1; the mean is weighted by it, so that a sample counts the
    same however much of it does: sum(mask error) / sum(mask). Where all is 1 the result is that without a mask, to the
    bit. A sample in which nothing counts has loss 0.
    """
    error = (prediction.float() - target.float()).square()
    if mask is not None:
        counts = mask.float().flatten(1)
        mean = (
            counts.sum(1) / counts.shape[1]
        )  # not .mean(), which may multiply by 1 / n: of ones it must be 1
        error = error * (counts / mean.clamp(min=1e-12)[:, None]).view(mask.shape)
    return error.flatten(1).mean(1)


def weighting(kind: LossWeighting, sigma: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Factor of each sample's loss, (B,), float32. sigma: (B,) in [0, 1], 1 = noise.

    none: 1. sigma_sqrt: sigma^-2, clamped at SIGMA_SQRT_FLOOR. cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2)).
    Source: Esser et al. 2024 (arXiv 2403.03206), section 3.1 and appendix B.2, and the names in diffusers'
    `training_utils`.

    min_snr: min((1 - sigma)^2, gamma sigma^2). Hang et al. 2023 (arXiv 2303.09556) weigh the loss of x0 with
    min(SNR, gamma). Here SNR = (1 - sigma)^2 / sigma^2, and as x0 = x_t - sigma v, the loss of x0 is sigma^2 times the
    velocity's. Both ends go to 0; the mean over uniform levels is below 1.
    """
    sigma = sigma.float()
    if kind == "none":
        return torch.ones_like(sigma)
    if kind == "sigma_sqrt":
        return sigma.clamp(min=SIGMA_SQRT_FLOOR) ** -2
    if kind == "min_snr":
        return torch.minimum((1 - sigma) ** 2, gamma * sigma**2)
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
