"""The small WAN's autoencoder: five frames of 48x48 to two latent frames of 12x12 cells and 16 channels, and back.

An `AutoencoderKLWan` with two halvings of the sides and of time. Most of what it learns from are the captions' shapes in motion,
the rest random blobs shifted and scaled at random, so that a motion passes too that the transformer has never drawn.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Generator, Tensor, nn

from whitetuner.nano.draw import COLOURS, SHAPES, SIZE_PX
from whitetuner.nano.edits import Scene
from whitetuner.nano.motions import FRAMES, SIDE_PX, clips, frames, painted
from whitetuner.nano.vae import blobs

CHANNELS = 16
#: Of the decoder at every size; the encoder has twice as many.
WIDTH = 16
BATCH = 8
LEARNING_RATE = 4e-3
#: Batches of 64 clips that the latents' moments are of.
MEASURED = 7
#: Deviation of the noise on latents: what the transformer predicts is never exact.
LATENT_NOISE = 0.03


def new_vae(seed: int, moments: tuple[list[float], list[float]] | None = None) -> AutoencoderKLWan:
    """With weights drawn from the seed. moments: mean and deviation of the latents' channels.

    Branches begin at nothing and the trunk as turns of its channels and means over time: from the class's own beginning a
    hundred steps go by before there is any picture.
    """
    torch.manual_seed(seed)
    mean, deviation = moments or ([0.0] * CHANNELS, [1.0] * CHANNELS)
    vae = AutoencoderKLWan(
        base_dim=2 * WIDTH,
        decoder_base_dim=WIDTH,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        latents_mean=mean,
        latents_std=deviation,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Conv3d):
                continue
            weight, bias = module.weight, module.bias
            assert bias is not None
            if name.endswith(("conv2", "proj")):
                nn.init.zeros_(weight)
                nn.init.zeros_(bias)
            elif not name.endswith(("conv1", "quant_conv")):
                nn.init.orthogonal_(weight.flatten(1))
                nn.init.zeros_(bias)
        # The posterior's deviation is a constant .1: only its mode is ever used.
        vae.quant_conv.weight[CHANNELS:] = 0
        vae.quant_conv.bias[CHANNELS:] = 2 * math.log(0.1)
    return vae


def optimizers(vae: AutoencoderKLWan) -> list[torch.optim.Optimizer]:
    """Muon for the kernels, each a matrix of one row a channel; AdamW for all else."""
    kernels: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in vae.named_parameters():
        (kernels if weight.ndim >= 4 and name.endswith("weight") else rest).append(weight)
    return [
        KernelMuon(kernels, LEARNING_RATE),
        torch.optim.AdamW(rest, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0),
    ]


class KernelMuon(torch.optim.Muon):
    """Muon takes matrices alone: it is given the kernels flattened, which share their memory."""

    def __init__(self, kernels: list[nn.Parameter], rate: float) -> None:
        self.kernels = kernels
        self.flat = [nn.Parameter(kernel.data.flatten(1)) for kernel in kernels]
        super().__init__(self.flat, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        for kernel, flat in zip(self.kernels, self.flat, strict=True):
            assert flat.data_ptr() == kernel.data_ptr() and kernel.grad is not None
            flat.grad = kernel.grad.flatten(1)
        return super().step(closure)


def loss_of(vae: AutoencoderKLWan, generator: Generator, half: bool) -> Tensor:
    """Of one batch: mean absolute and squared error of pixels and of what changes from frame to frame, and a light pull of
    latents to nothing. half: in bf16.

    Without the changes' share the frames after the first stay their mean for thousands of steps.
    """
    given = training_clips(generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        latents = vae.encode(given).latent_dist.mode()
        noise = LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        error = decoded(vae, latents + noise).float() - given
    motion = error.diff(dim=2)
    pixels = error.abs().mean() + error.square().mean() + motion.abs().mean() + motion.square().mean()
    return pixels + 1e-3 * latents.float().square().mean()


@torch.no_grad()
def measured(vae: AutoencoderKLWan, seed: int) -> AutoencoderKLWan:
    """The same with the moments of its latents."""
    latents = torch.cat(
        [
            vae.encode(as_clips(frames(some))).latent_dist.mode()
            for some in (clips(64, seed + 100 + i) for i in range(MEASURED))
        ]
    )
    channels = latents.transpose(0, 1).flatten(1)
    known = new_vae(seed, (channels.mean(1).tolist(), channels.std(1).tolist()))
    known.load_state_dict(vae.state_dict())
    return known.eval().requires_grad_(False)


def decoded(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """AutoencoderKLWan._decode without its clamp, beyond which nothing would be learned."""
    vae.clear_cache()
    mixed = vae.post_quant_conv(latents)
    parts = []
    for i in range(mixed.shape[2]):
        vae._conv_idx = [0]
        parts.append(
            vae.decoder(
                mixed[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0
            )
        )
    vae.clear_cache()
    return torch.cat(parts, 2)


def training_clips(generator: Generator) -> Tensor:
    """-> (8, 3, 5, 48, 48) in [-1, 1]."""
    seed = int(torch.randint(2**31, (), generator=generator))
    known = BATCH * 5 // 8
    return torch.cat([shapes(known, np.random.default_rng(seed)), moving_blobs(BATCH - known, generator)])


def shapes(n: int, rng: np.random.Generator) -> Tensor:
    """n clips of the captions' shapes on paths of their own: a start, an end, a bow between. (n, 3, 5, 48, 48)."""
    scenes = []
    time = np.linspace(0, 1, FRAMES)[:, None]
    for _ in range(n):
        shape = SHAPES[rng.integers(len(SHAPES))]
        colour, background = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        ends = rng.uniform(-1, 1, (2, 2)) * (5, 14)[rng.integers(2)]
        bow = rng.uniform(-12, 12, 2) * (rng.random() < 0.4)
        place = (
            SIZE_PX / 2
            + ends[0] * (1 - time)
            + ends[1] * time * rng.integers(2)
            + bow * 4 * time * (1 - time)
        )
        radius = rng.uniform(11, 22, 2) if rng.random() < 0.4 else np.full(2, rng.uniform(11, 15))
        radii = np.linspace(radius[0], radius[1], FRAMES)
        scenes += [Scene(shape, colour, background, x, y, r) for (x, y), r in zip(place, radii, strict=True)]
    return as_clips(painted(scenes).reshape(n, FRAMES, SIDE_PX, SIDE_PX, 3))


def as_clips(frames: np.ndarray) -> Tensor:
    """(n, f, h, w, 3) uint8 -> (n, 3, f, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def moving_blobs(n: int, generator: Generator) -> Tensor:
    """Blobs that are shifted by up to 5 pixels a frame, and scaled. (n, 3, 5, 48, 48) in [-1, 1]."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    time = torch.linspace(0, 1, FRAMES)[None, :]
    scale = torch.exp(0.3 * uniform(n, 1) * (uniform(n, 1) < -0.2) * time)
    shift = 0.6 * (uniform(n, 1, 2) * time[..., None] + uniform(n, 1, 2) * (time * (1 - time))[..., None])
    turned = torch.zeros(n, FRAMES, 2, 3)
    turned[..., 0, 0] = turned[..., 1, 1] = scale
    turned[..., 2] = shift
    still = blobs(n, generator).repeat_interleave(FRAMES, 0)
    grid = F.affine_grid(turned.flatten(0, 1), [len(still), 3, SIDE_PX, SIDE_PX], align_corners=False)
    moving = F.grid_sample(still, grid, padding_mode="border", align_corners=False)
    return moving.unflatten(0, (n, FRAMES)).transpose(1, 2).contiguous()
