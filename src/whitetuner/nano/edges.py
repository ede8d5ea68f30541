"""The last stage of the embedded model's training: its decoder, finished on what its transformer really makes.

The pipeline's last Euler step goes from sigma .48 to nothing: it takes a prediction for the picture itself. A
decoder that has seen exact latents alone answers those with soft edges, most of all on the points of small
stars and between colours that lie close. Here it learns from such predictions (of drawings whose picture is
known), and its loss counts an edge between red and orange as much as one between black and white.

The encoder and the transformer stay as they are.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Generator, Tensor

from whitetuner.nano.builtin import CFG
from whitetuner.nano.dit import position_ids
from whitetuner.nano.draw import SHAPES, draw_set
from whitetuner.nano.vae import as_tensor, blobs, latent_tokens, untokenized

LEARNING_RATE = 1.5e-3
PICTURES = 3000
#: Pointed outlines are the hard ones: three of eight are stars.
OUTLINES = (*SHAPES, "star", "star")
PREDICTED, EXACT, BLOBS = 8, 2, 4
#: The noise level that the prediction is made from, around that of the last step with 8 to 12 steps.
SIGMA = (0.3, 0.6)
#: Most deviation of the noise on exact latents; each picture has its own.
MOST_NOISE = 0.2
#: Up to this an edge is not too wide: drawings have 1.0 to 1.2.
WIDTH_PX = 1.2
#: The contrast (distance of two colours, channels in [-1, 1]) that counts once, and the most that less of it
#: can count.
CONTRAST, MOST_WEIGHT = 1.6, 3.0


def optimizers(vae: AutoencoderKLFlux2) -> list[torch.optim.Optimizer]:
    """Freezes all but the decoder."""
    vae.requires_grad_(False)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for weight in trained:
        weight.requires_grad_(True)
    return [torch.optim.AdamW(trained, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)]


class Lesson:
    """Drawings beside the latents that the transformer predicts for them.

    captions, embeddings: as in `dit.Lesson`, the empty caption's last.
    """

    def __init__(
        self,
        vae: AutoencoderKLFlux2,
        transformer: Flux2Transformer2DModel,
        captions: list[str],
        embeddings: Tensor,
        seed: int,
    ) -> None:
        number = {caption: i for i, caption in enumerate(captions)}
        drawings = draw_set(PICTURES, seed + 1, OUTLINES, held_out=False)
        generator = Generator().manual_seed(seed)
        self.pictures = torch.stack([as_tensor(drawing.image) for drawing in drawings])
        chosen = embeddings[[number[drawing.caption] for drawing in drawings]]
        self.latents = torch.cat(
            [
                untokenized(vae, predicted(transformer, tokens, captioned, embeddings[-1], generator))
                for tokens, captioned in zip(
                    latent_tokens(vae, self.pictures).split(100), chosen.split(100), strict=True
                )
            ]
        )

    def loss_of(self, vae: AutoencoderKLFlux2, generator: Generator, half: bool) -> Tensor:
        """Of one batch, contrast by contrast: absolute and squared error of pixels, absolute error of
        neighbours' differences and of pixels' being between their picture's two colours, and the pixels by
        which its edge is too wide.
        """
        picked = torch.randint(len(self.pictures), (PREDICTED,), generator=generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        exact = torch.stack([as_tensor(drawing.image) for drawing in draw_set(EXACT, seed, OUTLINES)])
        others = torch.cat([exact, blobs(BLOBS, generator)])
        pictures = torch.cat([self.pictures[picked], others]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.no_grad():
                latents = vae.encode(pictures[PREDICTED:]).latent_dist.mode().float()
            level = MOST_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator)
            latents = latents + level * torch.randn(latents.shape, generator=generator)
            drawn = vae.decode(torch.cat([self.latents[picked], latents])).sample.float()
        flat = pictures.flatten(2)
        contrast = (flat.amax(-1) - flat.amin(-1)).norm(dim=1)
        weight = (CONTRAST / contrast.clamp(min=CONTRAST / MOST_WEIGHT))[:, None, None, None]
        error = weight * (drawn - pictures)
        differences = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        two = slice(PREDICTED + EXACT)
        place, true_place = place_of(drawn[two], pictures[two]), place_of(pictures[two], pictures[two])
        softness = (between(place) - between(true_place)).abs().mean()
        too_wide = (edge_width_px(place) - WIDTH_PX).clamp(min=0).mean()
        return error.abs().mean() + error.square().mean() + differences + 0.3 * softness + 0.1 * too_wide


def place_of(drawn: Tensor, pictures: Tensor) -> Tensor:
    """Of each pixel of drawn, its place on the line between the two colours of pictures: 0 at the ground's, 1
    at the ink's. (n, 3, h, w) -> (n, h, w).
    """
    ground = pictures[:, :, 0, 0]
    far = (pictures - ground[:, :, None, None]).square().sum(1).flatten(1).argmax(1)
    axis = pictures.flatten(2)[torch.arange(len(pictures)), :, far] - ground
    along = torch.einsum("nchw,nc->nhw", drawn - ground[:, :, None, None], axis)
    return along / axis.square().sum(1)[:, None, None]


def between(place: Tensor) -> Tensor:
    """0 at either colour, 1 halfway."""
    return 4 * place * (1 - place)


def edge_width_px(place: Tensor) -> Tensor:
    """(n, h, w) -> (n): the width that `check` measures, as something that can be learnt from."""
    place = place.clamp(0, 1)
    down, right = torch.gradient(place, dim=(1, 2))
    length_px = (down.square() + right.square() + 1e-8).sqrt().sum((1, 2))
    return 1.5 * between(place).sum((1, 2)) / length_px


@torch.no_grad()
def predicted(
    transformer: Flux2Transformer2DModel,
    tokens: Tensor,
    captioned: Tensor,
    empty: Tensor,
    generator: Generator,
) -> Tensor:
    """tokens with noise added and taken away again by the transformer in one step with guidance, as the
    pipeline's last step does. tokens (n, 64, 32); captioned (n, 28, 144); empty (28, 144).
    """
    low, high = SIGMA
    sigma = low + (high - low) * torch.rand(len(tokens), generator=generator)
    level = sigma[:, None, None]
    noisy = (1 - level) * tokens + level * torch.randn(tokens.shape, generator=generator)
    image_ids, text_ids = position_ids()
    with_caption, without = (
        transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        for text in (captioned, empty.expand_as(captioned))
    )
    return noisy - level * (without + CFG * (with_caption - without))
