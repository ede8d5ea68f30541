"""The small WAN's transformer: a 2.1 image-to-video `WanTransformer3DModel` of five blocks, and what it learns from.

Every WAN reads 512 text tokens, and of a caption all but a few are zeros. In training those are one token that counts as many
times (`ShortText`): the same numbers for a fraction of the time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from torch import Generator, Tensor, nn

from whitetuner.nano import dit
from whitetuner.nano.fit import muon_and_adamw
from whitetuner.nano.motions import FRAMES, KINDS, SIDE_PX, caption_of, clips, frames
from whitetuner.nano.pretrain import kept_in
from whitetuner.nano.wan_parts import CLIP_HIDDEN, CLIP_TOKENS, HIDDEN, embed, seen
from whitetuner.nano.wan_vae import CHANNELS, as_clips

HEADS, HEAD_WIDTH, BLOCKS = 4, 32, 5
TEXT_TOKENS = 512
#: Rows that a caption takes in training, at least one of them a zero.
SHORT = 12
SHIFT = 5.0
BATCH = 32


def new_transformer(seed: int) -> WanTransformer3DModel:
    """With weights drawn from the seed."""
    torch.manual_seed(seed)
    width = HEADS * HEAD_WIDTH
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=2 * CHANNELS + 4,
        out_channels=CHANNELS,
        text_dim=HIDDEN,
        freq_dim=128,
        ffn_dim=3 * width,
        num_layers=BLOCKS,
        rope_max_seq_len=32,
        image_dim=CLIP_HIDDEN,
        added_kv_proj_dim=width,
    )
    for name, weight in transformer.named_parameters():
        if name.startswith("proj_out"):
            nn.init.zeros_(weight)
        elif "time_proj" in name and weight.ndim == 2:
            nn.init.normal_(weight, std=0.02)
        elif weight.ndim == 2:
            nn.init.xavier_uniform_(weight)
        elif name == "patch_embedding.weight":
            nn.init.xavier_uniform_(weight.flatten(1))
    return transformer


def optimizers(transformer: WanTransformer3DModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    return muon_and_adamw(transformer, ("blocks.",), dit.LEARNING_RATE)


class ShortText:
    """WAN's attention to first frame and text where the text is a few tokens and then zeros.

    weight: (B, 12), for how many tokens each row stands, as logarithms.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *rest: Any) -> Tensor:
        image, text = encoder_hidden_states.split([CLIP_TOKENS, SHORT], 1)

        def heads(one: Tensor) -> Tensor:
            return one.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.norm_q(attn.to_q(hidden_states)))
        key, value = heads(attn.norm_k(attn.to_k(text))), heads(attn.to_v(text))
        weight = self.weight[:, None, None].to(query)
        said = F.scaled_dot_product_attention(query, key, value, weight)
        key, value = heads(attn.norm_added_k(attn.add_k_proj(image))), heads(attn.add_v_proj(image))
        said = said + F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](said.transpose(1, 2).flatten(2).type_as(query))


def shortened(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(n, 12, 48), zeros after each text, and the logarithms of how many of the 512 each row stands for."""
    rows = torch.stack([F.pad(one, (0, 0, 0, SHORT - len(one))) for one in texts])
    weight = torch.zeros(len(texts), SHORT)
    for one, text in zip(weight, texts, strict=True):
        one[len(text) :] = math.log((TEXT_TOKENS - len(text)) / (SHORT - len(text)))
    return rows, weight


class Lesson:
    """Encoded clips, their captions' embeddings, and the loss on a batch of them.

    path: where they are kept, so that --resume need not encode again.
    """

    def __init__(self, pipeline: WanImageToVideoPipeline, count: int, seed: int, path: Path) -> None:
        kept = kept_in(path, lambda: _encoded(pipeline, count, seed))
        self.latents, self.conditions, self.seen = kept["latents"], kept["conditions"], kept["seen"]
        self.numbers = kept["numbers"]
        self.texts, self.weights = shortened(embed(pipeline, [*map(caption_of, KINDS), ""]))

    def loss_of(self, transformer: WanTransformer3DModel, generator: Generator) -> Tensor:
        """Mean squared error of one batch's velocity. In float32: bf16 takes longer with matrices as small as these."""
        chosen = torch.randint(len(self.latents), (BATCH,), generator=generator)
        emptied = torch.rand(BATCH, generator=generator) < dit.EMPTY_CAPTIONS
        said = torch.where(emptied, len(self.texts) - 1, self.numbers[chosen])
        clean = self.latents[chosen]
        level = torch.rand(BATCH, generator=generator)
        sigma = SHIFT * level / (1 + (SHIFT - 1) * level)
        noise = torch.randn(clean.shape, generator=generator)
        at = sigma.view(-1, 1, 1, 1, 1)
        drawn = velocity(
            transformer,
            (1 - at) * clean + at * noise,
            sigma,
            self.conditions[chosen],
            (self.texts[said], self.weights[said]),
            self.seen[chosen],
        )
        return F.mse_loss(drawn, noise - clean)


def velocity(
    transformer: WanTransformer3DModel,
    noisy: Tensor,
    sigma: Tensor,
    conditions: Tensor,
    texts: tuple[Tensor, Tensor],
    seen: Tensor,
) -> Tensor:
    """What the class says of these latents (B, 16, 2, 12, 12) and noise levels (B). texts: as `shortened` gives them."""
    whole = dict(transformer.attn_processors)
    short = ShortText(texts[1])
    transformer.set_attn_processor({name: short if ".attn2." in name else one for name, one in whole.items()})
    try:
        said: Tensor = transformer(
            hidden_states=torch.cat([noisy, conditions], 1),
            timestep=1000 * sigma,
            encoder_hidden_states=texts[0],
            encoder_hidden_states_image=seen,
            return_dict=False,
        )[0]
        return said
    finally:
        transformer.set_attn_processor(whole)


@torch.no_grad()
def _encoded(pipeline: WanImageToVideoPipeline, count: int, seed: int) -> dict[str, Tensor]:
    """latents (n, 16, 2, 12, 12), conditions (n, 20, 2, 12, 12), seen (n, 5, 16), numbers (n) of captions."""
    chosen = clips(count, seed + 1)
    latents, conditions, features = [], [], []
    for start in range(0, count, 64):
        drawn = frames(chosen[start : start + 64])
        latents.append(encoded(pipeline, as_clips(drawn)))
        conditions.append(condition(pipeline, drawn[:, 0]))
        features.append(seen(pipeline, drawn[:, 0]))
    number = {kind: i for i, kind in enumerate(KINDS)}
    return {
        "latents": torch.cat(latents),
        "conditions": torch.cat(conditions),
        "seen": torch.cat(features),
        "numbers": torch.tensor([number[clip.kind] for clip in chosen]),
    }


@torch.no_grad()
def encoded(pipeline: WanImageToVideoPipeline, given: Tensor) -> Tensor:
    """(n, 3, 5, 48, 48) in [-1, 1] -> (n, 16, 2, 12, 12), normalised as in the pipeline."""
    mean, deviation = moments(pipeline.vae)
    return (pipeline.vae.encode(given).latent_dist.mode() - mean) / deviation


def moments(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and deviation of latents, (1, 16, 1, 1, 1) each."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation


def condition(pipeline: WanImageToVideoPipeline, first: Any) -> Tensor:
    """First frames, (n, 48, 48, 3) uint8 -> (n, 20, 2, 12, 12): which frames are known, and the frame followed by grey ones."""
    given = torch.zeros(len(first), 3, FRAMES, SIDE_PX, SIDE_PX)
    given[:, :, :1] = as_clips(first[:, None])
    latent = encoded(pipeline, given)
    mask = torch.zeros(len(first), 4, *latent.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latent], 1)
