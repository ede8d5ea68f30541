"""The embedded model's transformer: a FLUX.2 Klein of one double and four single blocks, 1.6 M parameters.

Flow matching as the pipeline samples it: x = (1 - sigma) x0 + sigma noise, velocity = noise - x0, mean
squared error. With eight steps the pipeline spends seven above sigma .6 (its shift for 64 tokens is mu =
1.85), and there the outline is decided, so sigma is drawn from a logit-normal pushed towards noise.

Muon on the blocks' matrices, AdamW on the rest: outlines come sooner than with AdamW alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Generator, Tensor, nn

from whitetuner.nano.builtin import MAX_SEQUENCE_LENGTH
from whitetuner.nano.draw import SIZE_PX, draw_set
from whitetuner.nano.fit import muon_and_adamw
from whitetuner.nano.text import HIDDEN, TAPS
from whitetuner.nano.vae import LATENT_CHANNELS, as_tensor, latent_tokens

HEADS = 4
HEAD_WIDTH = 32
#: Of each head's 32 channels: frame, row, column, text position. Six frequencies an axis, 1 to 1/26 turns a
#: token, for a grid of eight; Klein's (32, 32, 32, 32) with theta 2000 would leave one that turns at all.
ROPE_AXES = (4, 12, 12, 4)
ROPE_THETA = 50
BATCH = 40
LEARNING_RATE = 2.2e-3
PICTURES = 16_000
#: Share of captions replaced by the empty one, which the pipeline's guidance needs.
EMPTY_CAPTIONS = 0.1
SIGMA_SHIFT, SIGMA_SPREAD = 0.8, 1.1
GRID = SIZE_PX // 8


def new_transformer(seed: int) -> Flux2Transformer2DModel:
    """With weights drawn from the seed."""
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=LATENT_CHANNELS * 4,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=HIDDEN * len(TAPS),
        timestep_guidance_channels=256,
        axes_dims_rope=ROPE_AXES,
        rope_theta=ROPE_THETA,
        guidance_embeds=False,
    )
    for name, weight in transformer.named_parameters():
        if "modulation" in name or "norm_out.linear" in name:
            nn.init.normal_(weight, std=0.02)
        elif name.startswith("proj_out"):
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            nn.init.xavier_uniform_(weight)
    return transformer


def optimizers(transformer: Flux2Transformer2DModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    return muon_and_adamw(transformer, ("transformer_blocks.", "single_transformer_blocks."), LEARNING_RATE)


def position_ids() -> tuple[Tensor, Tensor]:
    """(64, 4) of image tokens and (28, 4) of text tokens: frame, row, column, text position."""
    image = torch.cartesian_prod(*(torch.arange(k) for k in (1, GRID, GRID, 1)))
    return image, torch.cartesian_prod(*(torch.arange(k) for k in (1, 1, 1, MAX_SEQUENCE_LENGTH)))


def noised(clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens of this batch at noise levels of their own, the levels (B), the noise)."""
    sigma = torch.sigmoid(SIGMA_SHIFT + SIGMA_SPREAD * torch.randn(len(clean), generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    level = sigma[:, None, None]
    return (1 - level) * clean + level * noise, sigma, noise


class Lesson:
    """What the transformer learns from: encoded pictures, their captions' embeddings, and the loss on a batch
    of them.

    captions: every distinct caption; embeddings: theirs, (n, 28, 144), the empty caption's last.
    """

    def __init__(self, vae: AutoencoderKLFlux2, captions: list[str], embeddings: Tensor, seed: int) -> None:
        number = {caption: i for i, caption in enumerate(captions)}
        drawings = draw_set(PICTURES, seed, held_out=False)
        self.tokens = torch.cat(
            [
                latent_tokens(
                    vae, torch.stack([as_tensor(drawing.image) for drawing in drawings[start : start + 512]])
                )
                for start in range(0, PICTURES, 512)
            ]
        )
        self.captions = torch.tensor([number[drawing.caption] for drawing in drawings])
        self.embeddings = embeddings
        self.empty = len(embeddings) - 1
        self.image_ids, self.text_ids = position_ids()

    def loss_of(self, transformer: Callable[..., Any], generator: Generator, half: bool) -> Tensor:
        """Mean squared error of one batch's velocity. half: in bf16, faster where the processor has it."""
        chosen = torch.randint(len(self.tokens), (BATCH,), generator=generator)
        clean = self.tokens[chosen]
        emptied = torch.rand(BATCH, generator=generator) < EMPTY_CAPTIONS
        captions = torch.where(emptied, self.empty, self.captions[chosen])
        noisy, sigma, noise = noised(clean, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            velocity = transformer(
                hidden_states=noisy,
                timestep=sigma,
                guidance=None,
                encoder_hidden_states=self.embeddings[captions],
                txt_ids=self.text_ids,
                img_ids=self.image_ids,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - clean)
