"""The straight path from a picture to noise, and the velocity along it (rectified flow).

x_t = (1 - sigma) x0 + sigma noise for sigma in [0, 1], 1 = pure noise; d x_t / d sigma = noise - x0
everywhere on it. Source: Liu et al. 2022 (arXiv 2209.03003), Lipman et al. 2022 (arXiv 2210.02747). Every
family's own clock and sign hide in its `predict`.
"""

from __future__ import annotations

import torch


def noisy(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The point at `sigma`. x0, noise: (B, C, ...); sigma: (B,) in [0, 1], 1 = noise. Always in float32:

    bfloat16 has only 501 different sigmas between 0 and 1, so nothing here is ever rounded to it.
    """
    level = sigma.float().reshape(-1, *[1] * (x0.dim() - 1))
    return (1 - level) * x0.float() + level * noise.float()


def velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model has to say: noise - x0, float32, like x0."""
    return noise.float() - x0.float()
