"""Which noise level a sample is shown at, and its noise: pure functions of a generator of their own.

Nothing is drawn from a global generator and nothing for a whole batch: what a sample gets depends on (seed,
item id, visit, purpose) alone, so resuming, another batch size, world size or worker count changes nothing.

Five ways to draw sigma, in [0, 1], 1 = noise (shown to users as a timestep, 1000 sigma):
    linear         uniform
    sigmoid        logit-normal: sigmoid(bias + scale z), z normal (arXiv 2403.03206, section 3.1)
    weighted       uniform, and the loss is weighted by a bell around the middle: `loss_weight`
    shift          s u / (1 + (s - 1) u), u uniform: more noise for s > 1 (same paper, section 5.3.2)
    lognorm_blend  with probability alpha 1 - X, X log-normal(0, 1/3) redrawn until X < 1; else uniform
A range is held by drawing again, never by clamping, which would heap samples up at its ends.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch

from whitetuner.errors import UserError

Timesteps = Literal["linear", "sigmoid", "weighted", "shift", "lognorm_blend"]

LOGNORM_DEVIATION = 0.333
#: A range that fewer draws than this share fall into is refused: nobody means it, and redrawing would take
#: for ever.
LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class SigmaSettings:
    """How sigmas are drawn. Raises UserError when nothing, or nearly nothing, could ever be drawn.

    sigmoid_scale, sigmoid_bias: deviation and mean of the normal under the sigmoid
    shift: > 0, 1 = uniform
    lognorm_alpha: share of log-normal draws, [0, 1]
    min_timestep, max_timestep: bounds of 1000 sigma, both included
    part_range: [low, high) of the sigmas a part is trained at (WAN 2.2's experts); 1.0 as high is included
    """

    timesteps: Timesteps = "linear"
    sigmoid_scale: float = 1.0
    sigmoid_bias: float = 0.0
    shift: float = 1.0
    lognorm_alpha: float = 0.75
    min_timestep: float = 0.0
    max_timestep: float = 1000.0
    part_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("sigmoid_scale", "shift"):
            if not getattr(self, name) > 0:
                raise UserError(
                    "{value} is not above 0",
                    where=f"noise.{name}",
                    mend="give a number above 0 (1 is the usual one)",
                    value=getattr(self, name),
                )
        low, high = self.bounds
        share = cumulative(self, high) - cumulative(self, low) if low < high else 0.0
        if share < LEAST_SHARE:
            raise UserError(
                "no noise level is left: the timesteps run from {minimum:g} to {maximum:g}, this part's from"
                " {part_low:g} to {part_high:g}, and '{timesteps}' draws {share:.4%} of its levels in both",
                where="noise.min_timestep, noise.max_timestep",
                mend="widen the range (0 to 1000 is all), or draw timesteps another way",
                minimum=self.min_timestep,
                maximum=self.max_timestep,
                part_low=1000 * self.part_range[0],
                part_high=1000 * self.part_range[1],
                timesteps=self.timesteps,
                share=max(share, 0.0),
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest sigma that can be drawn."""
        low, high = self.part_range
        return max(low, self.min_timestep / 1000, 0.0), min(high, self.max_timestep / 1000, 1.0)

    def allows(self, sigma: float) -> bool:
        low, high = self.part_range
        return (
            self.min_timestep <= 1000 * sigma <= self.max_timestep
            and low <= sigma
            and (sigma < high or high == 1.0)
        )


def generator_for(seed: int, item_id: str, visit: int, purpose: str) -> torch.Generator:
    """The CPU generator of one draw: equal arguments give equal numbers, on every machine and in every order.

    visit: how often the item has been seen before; purpose: "sigma", "noise", ..., so that one draw does not
    depend on another.
    """
    key = "\0".join((str(seed), item_id, str(visit), purpose))
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


def draw_sigma(settings: SigmaSettings, generator: torch.Generator) -> float:
    """One sigma in [0, 1], 1 = noise. Redrawn until it is within the settings' range."""
    while True:
        sigma = _draw(settings, generator)
        if settings.allows(sigma):
            return sigma


def draw_noise(shape: tuple[int, ...], generator: torch.Generator, offset: float = 0.0) -> torch.Tensor:
    """Normal noise of one sample, float32 on the CPU. shape: (C, ...).

    offset: deviation of a constant added to each channel, by which the model learns to move the mean
    brightness; the target velocity uses the same noise, so the path stays straight. Source: N. Guttenberg,
    crosslabs.org/blog/diffusion-with-offset-noise.
    """
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise += offset * torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
    return noise


def loss_weight(settings: SigmaSettings, sigma: torch.Tensor) -> torch.Tensor:
    """Factor of each sample's loss that belongs to the way of drawing; mean 1 over what is drawn.

    sigma: (B,) in [0, 1]. Returns (B,), float32.
    weighted: exp(-2 (sigma - 1/2)^2) - exp(-1/2), divided by its mean over the range; everything else: 1.
    """
    if settings.timesteps != "weighted":
        return torch.ones_like(sigma, dtype=torch.float32)
    low, high = settings.bounds
    mean = (_bell_integral(high) - _bell_integral(low)) / (high - low)
    bell = torch.exp(-2 * (sigma.double() - 0.5) ** 2) - math.exp(-0.5)
    return (bell.clamp(min=0) / mean).float()


def cumulative(settings: SigmaSettings, sigma: float) -> float:
    """Share of draws at or below sigma, before any range is applied; the curve to show to people."""
    if sigma <= 0 or sigma >= 1:
        return float(sigma >= 1)
    if settings.timesteps == "sigmoid":
        return _normal_cdf((math.log(sigma / (1 - sigma)) - settings.sigmoid_bias) / settings.sigmoid_scale)
    if settings.timesteps == "shift":
        return sigma / (settings.shift - (settings.shift - 1) * sigma)
    if settings.timesteps == "lognorm_blend":
        lognormal = 1 - 2 * _normal_cdf(math.log1p(-sigma) / LOGNORM_DEVIATION)
        return settings.lognorm_alpha * lognormal + (1 - settings.lognorm_alpha) * sigma
    return sigma


def _draw(settings: SigmaSettings, generator: torch.Generator) -> float:
    if settings.timesteps == "sigmoid":
        logit = settings.sigmoid_bias + settings.sigmoid_scale * _normal(generator)
        return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0  # math.exp overflows beyond
    u = _uniform(generator)
    if settings.timesteps == "shift":
        return settings.shift * u / (1 + (settings.shift - 1) * u)
    if settings.timesteps == "lognorm_blend" and u < settings.lognorm_alpha:
        while True:
            x = math.exp(LOGNORM_DEVIATION * _normal(generator))
            if x < 1:
                return 1 - x
    if settings.timesteps == "lognorm_blend":
        return _uniform(generator)
    return u


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _normal(generator: torch.Generator) -> float:
    return float(torch.randn((), generator=generator, dtype=torch.float64))


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _bell_integral(x: float) -> float:
    """Antiderivative of exp(-2 (x - 1/2)^2) - exp(-1/2)."""
    return math.sqrt(math.pi / 8) * math.erf(math.sqrt(2) * (x - 0.5)) - math.exp(-0.5) * x
