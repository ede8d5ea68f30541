"""The straight path and the loss along it."""

from __future__ import annotations

import math

import pytest
import torch

from whitetuner.assemble import step_settings
from whitetuner.config.load import load_config
from whitetuner.diffusion.loss import SIGMA_SQRT_FLOOR, sample_losses, weighting
from whitetuner.diffusion.path import noisy, velocity
from whitetuner.family import Part


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 2, 5, 6)])
def test_the_path_runs_from_the_picture_to_the_noise(shape: tuple[int, ...]) -> None:
    x0, noise = numbers(*shape), numbers(*shape, seed=1)
    assert torch.equal(noisy(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(noisy(x0, noise, torch.ones(3)), noise)


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    x0, noise = numbers(2, 3, 4, 4).double(), numbers(2, 3, 4, 4, seed=1).double()
    low, high = torch.tensor([0.2, 0.5]), torch.tensor([0.6, 0.9])
    slope = (noisy(x0, noise, high) - noisy(x0, noise, low)) / (high - low).reshape(-1, 1, 1, 1)
    assert torch.allclose(slope, velocity(x0, noise), atol=3e-6)  # float32 rounding divided by a step of 0.4


def test_from_any_point_the_velocity_leads_back_to_the_picture() -> None:
    x0, noise, sigma = numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=1), torch.tensor([0.3, 0.8])
    back = noisy(x0, noise, sigma) - sigma.reshape(-1, 1, 1, 1) * velocity(x0, noise)
    assert torch.allclose(back, x0, atol=1e-6)


def test_every_sample_has_its_own_sigma() -> None:
    x0, noise, sigma = numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=1), torch.tensor([0.3, 0.8])
    both = noisy(x0, noise, sigma)
    for i in range(2):
        assert torch.equal(both[i : i + 1], noisy(x0[i : i + 1], noise[i : i + 1], sigma[i : i + 1]))


def test_bfloat16_latents_are_mixed_in_float32() -> None:
    x0, noise = numbers(1, 1, 64, 64).bfloat16(), numbers(1, 1, 64, 64, seed=1)
    mixed = noisy(x0, noise, torch.tensor([0.5001]))
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, noisy(x0, noise, torch.tensor([0.5002])))  # both are 0.5 in bfloat16


def test_losses_are_means_of_squares_sample_by_sample() -> None:
    prediction, target = numbers(3, 2, 4, 4), numbers(3, 2, 4, 4, seed=1)
    losses = sample_losses(prediction, target)
    assert losses.shape == (3,)
    for i in range(3):
        assert float(losses[i]) == pytest.approx(
            float(torch.nn.functional.mse_loss(prediction[i], target[i]))
        )
        alone = sample_losses(prediction[i : i + 1], target[i : i + 1])
        assert torch.equal(alone, losses[i : i + 1])  # a sample's loss does not know its batch


def test_a_mask_takes_the_mean_over_what_counts() -> None:
    prediction, target = numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=1)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :, :2] = 1
    masked = sample_losses(prediction, target, mask)
    assert float(masked[0]) == pytest.approx(float((prediction - target)[0, :, :, :2].square().mean()))
    assert float(masked[1]) == 0
    mask[0, :, :, 2:] = 0.25  # counts a quarter
    error = (prediction - target)[0].square()
    wanted = (error[..., :2].mean() + 0.25 * error[..., 2:].mean()) / 1.25
    assert float(sample_losses(prediction, target, mask)[0]) == pytest.approx(float(wanted))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 7, 7), (1, 2, 3, 9, 11), (2, 4, 33, 49)])
def test_a_white_mask_is_no_mask_to_the_bit_gradients_too(shape: tuple[int, ...]) -> None:
    """Of 49 and 1617 numbers too, whose share 1 / n times n is not 1."""
    target, found = numbers(*shape, seed=1), []
    for mask in (None, torch.ones(shape[0], *[1] * (len(shape) - 3), *shape[-2:])):
        prediction = numbers(*shape).requires_grad_()
        losses = sample_losses(prediction, target, mask)
        losses.sum().backward()
        found.append((losses.detach(), prediction.grad))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_does_not_count_has_no_influence_at_all() -> None:
    prediction, target = numbers(2, 3, 4, 6).requires_grad_(), numbers(2, 3, 4, 6, seed=1)
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, 1:3, 2:5] = torch.tensor([0.3, 1.0, 0.7])
    losses = sample_losses(prediction, target, mask)
    losses.sum().backward()
    counts = (mask > 0).expand_as(target)
    assert prediction.grad is not None
    assert not prediction.grad[~counts].any() and prediction.grad[counts].all()
    changed = torch.where(counts, target, numbers(2, 3, 4, 6, seed=2))
    assert torch.equal(sample_losses(prediction, changed, mask), losses)


def test_a_sample_counts_the_same_however_much_of_it_does() -> None:
    """Errors of 1 all over have loss 1 under every mask."""
    target = numbers(3, 2, 8, 8)
    for floor in (0.0, 0.1, 0.5):
        mask = (numbers(3, 1, 8, 8, seed=4) > 1).float() * (1 - floor) + floor
        assert torch.allclose(sample_losses(target + 1, target, mask), torch.ones(3), atol=1e-6)


def test_losses_are_float32_whatever_the_model_says() -> None:
    target = numbers(1, 1, 8, 8)
    assert sample_losses(target.bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_velocity_so_that_the_picture_is_weighed_by_the_bounded_ratio(
    gamma: float,
) -> None:
    x0, noise, said = numbers(50, 3, 4), numbers(50, 3, 4, seed=1), numbers(50, 3, 4, seed=2)
    sigma = torch.linspace(0.02, 1, 50)
    level = sigma[:, None, None]
    seen = noisy(x0, noise, sigma) - level * said  # the picture that the velocity `said` means
    ratio = ((1 - sigma) / sigma) ** 2
    wanted = ratio.clamp(max=gamma) * sample_losses(seen, x0)
    found = weighting("min_snr", sigma, gamma) * sample_losses(said, velocity(x0, noise))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(weighting("min_snr", torch.tensor([0.0, 1.0]), gamma), torch.zeros(2))


def test_the_config_s_weighting_and_gamma_come_to_the_step() -> None:
    base = {"model.family": "flux2-klein", "noise.loss_weighting": "min_snr", "noise.min_snr_gamma": 2.5}
    found = step_settings(load_config(None, base=base).config, 1.0, Part("transformer", ()))
    assert (found.loss_weighting, found.min_snr_gamma) == ("min_snr", 2.5)
    plain = load_config(None, base={"model.family": "flux2-klein"}).config
    assert step_settings(plain, 1.0, Part("transformer", ())).loss_weighting == "none"


def test_weightings_are_their_formulas_and_bounded() -> None:
    sigma = torch.linspace(0, 1, 101)
    assert torch.equal(weighting("none", sigma), torch.ones(101))
    cosmap = weighting("cosmap", sigma)
    assert float(cosmap[50]) == pytest.approx(4 / math.pi) and float(cosmap[0]) == pytest.approx(2 / math.pi)
    assert torch.trapezoid(cosmap.double(), sigma.double()) == pytest.approx(
        1, abs=1e-4
    )  # a density, hence mean 1
    sqrt = weighting("sigma_sqrt", sigma)
    above = sigma >= SIGMA_SQRT_FLOOR
    assert torch.allclose(sqrt[above], sigma[above] ** -2)
    assert torch.isfinite(sqrt).all() and torch.equal(
        sqrt[~above], torch.full_like(sqrt[~above], float(sqrt.max()))
    )
