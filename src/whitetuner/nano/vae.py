"""The embedded model's autoencoder: 64x64 pictures to 16x16 latents of 8 channels and back.

Half of its pictures are the captions' shapes, half are random blobs in random colours: the autoencoder must
also pass an outline that the transformer has never drawn, or the demo could not teach one.

The class normalises each layer over groups of channels, which removes a picture's mean and scale. With
several groups flat colours cannot pass at all; one group, residual branches that start at nothing, and a
constant in front of the last normalisation of each half (so that absolute colour survives it) make it learn
within minutes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from torch import Generator, Tensor, nn

from whitetuner.nano.draw import PALETTE_RGB, SIZE_PX, draw_set

CHANNELS = (16, 32, 48)
LATENT_CHANNELS = 8
BATCH = 16
LEARNING_RATE = 2.5e-3
DECODER_LEARNING_RATE = 2e-3
#: Deviation of the noise on latents (theirs is .75): what the transformer predicts is never exact.
LATENT_NOISE = 0.03
DECODER_LATENT_NOISE = 0.08


def new_vae(seed: int) -> AutoencoderKLFlux2:
    """With weights drawn from the seed."""
    torch.manual_seed(seed)
    depth = len(CHANNELS)
    vae = AutoencoderKLFlux2(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=SIZE_PX,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        # The posterior's deviation is a constant .1: only its mode is ever used.
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = 2 * math.log(0.1)
        for name, module in vae.named_modules():
            if name.endswith("conv2"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        for resnet in (vae.encoder.mid_block.resnets[-1], vae.decoder.up_blocks[-1].resnets[-1]):
            resnet.conv2.bias.copy_(torch.tensor([1.5, -1.5]).repeat(len(resnet.conv2.bias) // 2))
    return vae.to(memory_format=torch.channels_last)


def optimizers(vae: AutoencoderKLFlux2) -> list[torch.optim.Optimizer]:
    """One, for all of the VAE."""
    return [torch.optim.AdamW(vae.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)]


def decoder_optimizers(vae: AutoencoderKLFlux2) -> list[torch.optim.Optimizer]:
    """Freezes all but the decoder."""
    vae.requires_grad_(False)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for weight in trained:
        weight.requires_grad_(True)
    return [torch.optim.AdamW(trained, DECODER_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)]


def loss_of(vae: AutoencoderKLFlux2, generator: Generator, half: bool) -> Tensor:
    """Of one batch: mean absolute and squared error of pixels, and a light pull of latents to nothing.

    half: in bf16, twice as fast where the processor has it.
    """
    pictures = training_pictures(generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        latents = vae.encode(pictures).latent_dist.mode()
        noise = LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        error = vae.decode(latents + noise).sample.float() - pictures
    return error.abs().mean() + error.square().mean() + 1e-3 * latents.float().square().mean()


def decoder_loss_of(vae: AutoencoderKLFlux2, generator: Generator, half: bool) -> Tensor:
    """The same for the decoder alone, on less exact latents; and the absolute error of neighbours' differences.

    The differences make edges crisp; a transformer already trained on these latents stays valid.
    """
    pictures = training_pictures(generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mode()
        noise = DECODER_LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        error = vae.decode(latents + noise).sample.float() - pictures
    differences = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + differences


def training_pictures(generator: Generator) -> Tensor:
    """-> (16, 3, 64, 64) in [-1, 1]."""
    seed = int(torch.randint(2**31, (), generator=generator))
    known = torch.stack([as_tensor(drawing.image) for drawing in draw_set(BATCH // 2, seed)])
    pictures = torch.cat([known, blobs(BATCH - BATCH // 2, generator)])
    return pictures.contiguous(memory_format=torch.channels_last)


def as_tensor(image: np.ndarray) -> Tensor:
    """(h, w, 3) uint8 -> (3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1


def blobs(n: int, generator: Generator) -> Tensor:
    """n pictures of one to three wavy discs, plain or halved, in palette or random colours. (n, 3, 64, 64) in
    [-1, 1].
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def colours() -> Tensor:
        palette = torch.from_numpy(PALETTE_RGB).float()
        named = palette[torch.randint(len(palette), (n,), generator=generator)]
        return torch.where(uniform(n, 1) < 0.5, uniform(n, 3) * 255, named)[:, :, None, None]

    grid = torch.arange(SIZE_PX) + 0.5
    picture = colours().expand(n, 3, SIZE_PX, SIZE_PX)
    for chance in (1.0, 0.4, 0.25):
        x = grid[None, None, :] - (12 + 40 * uniform(n, 1, 1))
        y = grid[None, :, None] - (12 + 40 * uniform(n, 1, 1))
        radius = 6 + 18 * uniform(n, 1, 1)
        turn = 2 * math.pi * uniform(n, 1, 1)
        angle = torch.atan2(y, x)
        wave = torch.ones(n, SIZE_PX, SIZE_PX)
        for lobes in range(2, 7):
            height = 0.25 * (uniform(n, 1, 1) < 0.4) * uniform(n, 1, 1)
            wave = wave + height * torch.cos(lobes * angle + turn * lobes * 2)
        cover = (0.5 - (torch.hypot(x, y) - radius * wave)).clamp(0, 1)[:, None]
        cover = cover * (uniform(n, 1, 1, 1) < chance)
        halved = (0.5 + x * torch.cos(turn) + y * torch.sin(turn)).clamp(0, 1)[:, None] * (
            uniform(n, 1, 1, 1) < 0.4
        )
        ink = colours() * (1 - halved) + colours() * halved
        picture = picture * (1 - cover) + ink * cover
    return picture / 127.5 - 1


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLFlux2, seed: int) -> None:
    """Fills the class's batch-norm buffers, which normalise latents in the pipeline, from 1024 drawings."""
    pictures = torch.stack([as_tensor(drawing.image) for drawing in draw_set(1024, seed, held_out=False)])
    latents = _patchified(vae, pictures)
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))


@torch.no_grad()
def latent_tokens(vae: AutoencoderKLFlux2, pictures: Tensor) -> Tensor:
    """(n, 3, 64, 64) in [-1, 1] -> (n, 64, 32), normalised as in the pipeline: the transformer's x0."""
    mean, deviation = _latent_statistics(vae)
    return ((_patchified(vae, pictures) - mean) / deviation).flatten(2).transpose(1, 2)


@torch.no_grad()
def untokenized(vae: AutoencoderKLFlux2, tokens: Tensor) -> Tensor:
    """(n, 64, 32) as `latent_tokens` gives them -> (n, 8, 16, 16), as the decoder takes them."""
    mean, deviation = _latent_statistics(vae)
    side = SIZE_PX // 8
    z = tokens.transpose(1, 2).unflatten(2, (side, side)) * deviation + mean
    z = z.unflatten(1, (LATENT_CHANNELS, 2, 2)).permute(0, 1, 4, 2, 5, 3)
    return z.reshape(len(tokens), LATENT_CHANNELS, 2 * side, 2 * side)


def _latent_statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (1, 32, 1, 1) each."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)


def _patchified(vae: AutoencoderKLFlux2, pictures: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 32, h / 8, w / 8): channel order (channel, row, column), as in the pipeline."""
    parts = []
    for some in pictures.split(128):
        z = vae.encode(some.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        n, channels, height, width = z.shape
        z = z.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        parts.append(z.reshape(n, channels * 4, height // 2, width // 2))
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLFlux2, pictures: Tensor) -> Tensor:
    """pictures: (B, 3, H, W) in [-1, 1], encoded by their mode and decoded, 128 at a time."""
    return torch.cat([vae.decode(vae.encode(some).latent_dist.mode()).sample for some in pictures.split(128)])
