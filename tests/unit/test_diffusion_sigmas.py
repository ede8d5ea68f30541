"""Each way of drawing sigma against its density, told here a second time, from its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from whitetuner.diffusion.sigmas import (
    SigmaSettings,
    cumulative,
    draw_noise,
    draw_sigma,
    generator_for,
    loss_weight,
)
from whitetuner.errors import UserError

DRAWS = 4000
#: Kolmogorov-Smirnov: sqrt(n) D exceeds 1.95 once in a thousand correct samples. The seeds are fixed, so a
#: right sampling passes for ever; the mutants below miss by far more.
KS_BOUND = 1.95


def draws(settings: SigmaSettings, count: int = DRAWS, seed: int = 0) -> torch.Tensor:
    """As training draws them: one generator a sample."""
    return torch.tensor(
        [draw_sigma(settings, generator_for(seed, f"item{i}", 0, "sigma")) for i in range(count)],
        dtype=torch.float64,
    )


def distribution_of(
    density: Callable[[torch.Tensor], torch.Tensor], low: float, high: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Distribution function on [low, high] of an unnormalised density, by the midpoint rule on 200,000
    cells.
    """
    cells = 200_000
    edges = torch.linspace(low, high, cells + 1, dtype=torch.float64)
    mass = density((edges[1:] + edges[:-1]) / 2)
    summed = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)]) / mass.sum()
    return lambda x: summed[((x - low) / (high - low) * cells).round().long().clamp(0, cells)]


def ks(sample: torch.Tensor, distribution: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """sqrt(n) times the largest gap between the sample's distribution function and the given one."""
    ordered = sample.sort().values
    n = len(ordered)
    expected = distribution(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    gap = torch.maximum((steps[1:] - expected).abs(), (expected - steps[:-1]).abs()).max()
    return float(gap) * math.sqrt(n)


def uniform(s: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(s)


def logit_normal(scale: float, bias: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda s: torch.exp(-(((s / (1 - s)).log() - bias) ** 2) / (2 * scale**2)) / (s * (1 - s))


def shifted(shift: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Density of s u / (1 + (s - 1) u): the derivative of its inverse."""
    return lambda s: shift / (shift - (shift - 1) * s) ** 2


def blend(alpha: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """1 - X for a log-normal X below 1 (half of all X are), and a uniform part."""

    def density(s: torch.Tensor) -> torch.Tensor:
        x = 1 - s
        lognormal = torch.exp(-(x.log() ** 2) / (2 * 0.333**2)) / (x * 0.333 * math.sqrt(2 * math.pi))
        return alpha * 2 * lognormal + (1 - alpha)

    return density


WAYS = {
    "linear": (SigmaSettings("linear"), uniform),
    "weighted": (SigmaSettings("weighted"), uniform),
    "sigmoid": (SigmaSettings("sigmoid"), logit_normal(1.0, 0.0)),
    "sigmoid, wide": (SigmaSettings("sigmoid", sigmoid_scale=2.5), logit_normal(2.5, 0.0)),
    "sigmoid, biased": (
        SigmaSettings("sigmoid", sigmoid_scale=0.7, sigmoid_bias=0.4),
        logit_normal(0.7, 0.4),
    ),
    "shift": (SigmaSettings("shift", shift=3.0), shifted(3.0)),
    "shift down": (SigmaSettings("shift", shift=0.5), shifted(0.5)),
    "lognorm_blend": (SigmaSettings("lognorm_blend", lognorm_alpha=0.75), blend(0.75)),
    "lognorm_blend, all": (SigmaSettings("lognorm_blend", lognorm_alpha=1.0), blend(1.0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_sigmas_follow_the_density_of_their_name(way: str) -> None:
    settings, density = WAYS[way]
    assert ks(draws(settings), distribution_of(density, 0, 1)) < KS_BOUND


@pytest.mark.parametrize("way", WAYS)
def test_the_curve_shown_is_the_distribution_drawn_from(way: str) -> None:
    settings, density = WAYS[way]
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)
    shown = torch.tensor([cumulative(settings, float(s)) for s in grid], dtype=torch.float64)
    # 1e-4: error of the midpoint rule where the logit-normal is steepest.
    assert (shown - distribution_of(density, 0, 1)(grid)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("taken", "density"),
    [
        ("sigmoid", uniform),  # the error of drawing sigmoid(logit(u)): scale 1 would be exactly uniform
        ("sigmoid", logit_normal(1.0, 0.2)),
        ("shift", shifted(2.0)),
        ("lognorm_blend", uniform),  # the error of int(batch_size * alpha) log-normals: none at batch size 1
        ("lognorm_blend", blend(0.65)),
    ],
)
def test_another_density_is_told_apart(taken: str, density: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert ks(draws(WAYS[taken][0]), distribution_of(density, 0, 1)) > 1.5 * KS_BOUND


@pytest.mark.parametrize("way", WAYS)
def test_a_range_is_held_by_drawing_again_not_by_clamping(way: str) -> None:
    settings, density = WAYS[way]
    sample = draws(replace(settings, min_timestep=400.0, max_timestep=600.0))
    assert sample.min() >= 0.4 and sample.max() <= 0.6
    # Clamping would leave up to 40 % of all samples at exactly one of two values.
    assert len(sample.unique()) == len(sample)
    assert ks(sample, distribution_of(density, 0.4, 0.6)) < KS_BOUND


def test_the_range_of_a_part_and_the_users_range_both_hold() -> None:
    settings = SigmaSettings("shift", shift=5.0, max_timestep=950.0, part_range=(0.9, 1.0))
    sample = draws(settings, 500)
    assert sample.min() >= 0.9 and sample.max() <= 0.95


def test_parts_divide_the_levels_without_overlap() -> None:
    high, low = SigmaSettings(part_range=(0.9, 1.0)), SigmaSettings(part_range=(0.0, 0.9))
    for sigma in (0.0, 0.3, 0.9, 0.95, 1.0):
        assert high.allows(sigma) != low.allows(sigma)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_timestep": 600.0, "max_timestep": 500.0},
        {"min_timestep": 500.0, "max_timestep": 500.0},
        {"max_timestep": 500.0, "part_range": (0.9, 1.0)},
        {"timesteps": "sigmoid", "sigmoid_scale": 0.1, "min_timestep": 900.0},
        {"sigmoid_scale": 0.0},
        {"shift": -1.0},
        {"shift": float("nan")},
    ],
)
def test_a_range_that_nothing_falls_into_is_told_at_once(wrong: dict) -> None:
    with pytest.raises(UserError, match=r"noise\."):
        SigmaSettings(**wrong)


def test_what_a_sample_gets_does_not_depend_on_its_neighbours() -> None:
    settings = SigmaSettings("lognorm_blend")
    forwards = [draw_sigma(settings, generator_for(7, f"i{i}", 2, "sigma")) for i in range(20)]
    torch.rand(3)  # a global generator that others use has no part in it
    backwards = [draw_sigma(settings, generator_for(7, f"i{i}", 2, "sigma")) for i in reversed(range(20))]
    assert forwards == backwards[::-1]


def test_seed_item_visit_and_purpose_each_matter() -> None:
    said = {
        draw_sigma(SigmaSettings(), generator_for(*key))
        for key in [
            (1, "a", 0, "sigma"),
            (2, "a", 0, "sigma"),
            (1, "b", 0, "sigma"),
            (1, "a", 1, "sigma"),
            (1, "a", 0, "noise"),
            (1, "a0", 0, "sigma"),
            (11, "a", 0, "sigma"),
        ]
    }
    assert len(said) == 7


def test_draws_stay_what_they_are_from_version_to_version() -> None:
    """A run begun with one version is resumed with the next: these values may not change."""
    generator = generator_for(42, "0f3a-0", 5, "sigma")
    assert generator.initial_seed() == 4809622831291479262
    # rel: the last bits of exp and of the normal transform belong to the machine's libm.
    assert draw_sigma(SigmaSettings("sigmoid"), generator) == pytest.approx(0.6244409089494857, rel=1e-12)
    assert draw_noise((1, 2), generator_for(42, "0f3a-0", 5, "noise")).flatten().tolist() == pytest.approx(
        [-0.8297632336616516, 0.6758410334587097], rel=1e-6
    )


def test_the_bell_weight_has_mean_one_and_only_belongs_to_weighted() -> None:
    sigma = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    weight = loss_weight(SigmaSettings("weighted"), sigma)
    assert weight.dtype == torch.float32
    assert float(weight.double().mean()) == pytest.approx(1, abs=1e-4)  # 1e-4: the sum's ends count double
    assert float(weight[0]) == pytest.approx(0, abs=1e-6) and weight.max() == weight[50_000]
    shape = torch.exp(-2 * (sigma - 0.5) ** 2) - math.exp(-0.5)
    assert torch.allclose(weight.double(), shape / shape.mean(), atol=1e-4)
    assert torch.equal(loss_weight(SigmaSettings("linear"), sigma), torch.ones(len(sigma)))


def test_the_bell_weight_has_mean_one_over_a_range_too() -> None:
    settings = SigmaSettings("weighted", min_timestep=100, max_timestep=300)
    sigma = torch.linspace(0.1, 0.3, 100_001, dtype=torch.float64)
    assert float(loss_weight(settings, sigma).double().mean()) == pytest.approx(1, abs=1e-4)


def test_noise_is_normal_and_its_offset_is_one_constant_a_channel() -> None:
    plain = draw_noise((4, 32, 32), generator_for(0, "a", 0, "noise"))
    moved = draw_noise((4, 32, 32), generator_for(0, "a", 0, "noise"), offset=0.1)
    # Standard errors of mean and deviation of 4096 numbers: 0.016 and 0.011; four of each.
    assert plain.dtype == torch.float32 and abs(plain.mean()) < 0.064 and abs(plain.std() - 1) < 0.044
    constant = (moved - plain).flatten(1)
    assert constant.std(1).max() < 1e-6 and constant.mean(1).abs().min() > 0
    constants = torch.stack(
        [
            draw_noise((2, 1, 1), generator_for(0, f"{i}", 0, "n"), 0.1)
            - draw_noise((2, 1, 1), generator_for(0, f"{i}", 0, "n"))
            for i in range(1000)
        ]
    )
    assert float(constants.std()) == pytest.approx(
        0.1, rel=0.07
    )  # 2000 numbers: four standard errors of the deviation


def test_noise_of_video_has_an_offset_for_all_frames_together() -> None:
    plain = draw_noise((2, 3, 4, 4), generator_for(0, "v", 0, "noise"))
    moved = draw_noise((2, 3, 4, 4), generator_for(0, "v", 0, "noise"), offset=1.0)
    assert (moved - plain).flatten(1).std(1).max() < 1e-5
