"""A small Z-Image on the embedded model's autoencoder and text encoder: only its transformer is trained.

    python -m whitetuner.nano.pretrain_zimage --out DIR [--minutes M] [--threads N] [--seed S] [--resume]
                                              [--steps N] [--float32]

DIR/model is the folder (a `ZImagePipeline` in bf16), DIR/state what --resume goes on from. Where time runs out, --resume
with fewer --steps lets the learning rate fall from there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL.Image import Image
from torch import Generator, Tensor, nn

from whitetuner.nano import dit, vae
from whitetuner.nano.builtin import CFG, STEPS
from whitetuner.nano.card import ZIMAGE, Training, write_small_card
from whitetuner.nano.draw import NEW_SHAPE, NEW_WORD, SIZE_PX, draw_set
from whitetuner.nano.fit import Fit, Plan, muon_and_adamw
from whitetuner.nano.pretrain import arguments, begin, exit_code, kept_in, save
from whitetuner.nano.score import evaluation_prompts, generators, load_pipeline, score
from whitetuner.nano.text import HIDDEN
from whitetuner.nano.zimage_forward import CAPTION_TOKENS, padded, tokens_of, turns, velocity

STEPS_PLANNED = 2700
#: The last steps run in float32, to end where the pipeline computes.
HALF_SHARE = 0.9
SHIFT = 3.0
PICTURES = 6000
SCORED = 200
SCORE_SEED = 2024


def main(words: list[str] | None = None) -> int:
    options = _options(words)
    return exit_code(lambda: pretrain(options, plan_of(options.steps)))


def plan_of(steps: int) -> Plan:
    return Plan(steps=steps, warmup=100, decay=0.36, ema=0.998)


def pretrain(options: argparse.Namespace, plan: Plan, pictures: int = PICTURES, n: int = SCORED) -> None:
    """Raises UserError for a folder with a training in it and no --resume."""
    begin(options)
    deadline = time.monotonic() + 60 * options.minutes
    pipeline = new_pipeline(options.seed)
    model = pipeline.transformer
    lesson = Lesson(pipeline, pictures, options.seed, options.out / "state" / "lesson.pt")
    fit = Fit("zimage", model, optimizers(model), plan, options.out / "state" / "zimage.pt")
    fit.load()
    border = HALF_SHARE * plan.steps if options.half else 0
    fit.run(lambda generator, step: lesson.loss_of(model, generator, step < border), options.seed, deadline)
    fit.averaged(model)
    folder = options.out / "model"
    save(pipeline, folder, CAPTION_TOKENS)
    pipeline.to(torch.float32)
    scores: dict[str, float] = {}
    for name, seed, choice in (
        ("fresh captions", SCORE_SEED, {}),
        ("combinations never trained on", SCORE_SEED + 1, {"held_out": True}),
        ("the new word, never trained on", SCORE_SEED + 2, {"shapes": (NEW_SHAPE,), "word": NEW_WORD}),
    ):
        captions, labels = evaluation_prompts(n, seed, **choice)
        seen = score(draw_each(pipeline, captions, seed), labels)
        scores[f"{name} (shapes {seen.shape:.1%}, colours {seen.colour:.1%})"] = seen.all
    training = Training(fit.name, fit.progress.step, plan.steps, fit.progress.seconds)
    write_small_card(folder, ZIMAGE, options.seed, training, fit.progress.loss, n, scores)


def new_pipeline(seed: int) -> ZImagePipeline:
    """The embedded model's parts around an untrained transformer, float32."""
    klein = load_pipeline()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=plain_vae(klein.vae, seed),
        text_encoder=klein.text_encoder.requires_grad_(False),
        tokenizer=klein.tokenizer,
        transformer=new_transformer(seed),
    )


@torch.no_grad()
def plain_vae(given: AutoencoderKLFlux2, seed: int) -> AutoencoderKL:
    """The same modules and weights; latents are normalised by two numbers instead of two a channel."""
    pictures = torch.stack([vae.as_tensor(one.image) for one in draw_set(256, seed, held_out=False)])
    latents = given.encode(pictures).latent_dist.mode()
    names = (
        "block_out_channels",
        "down_block_types",
        "up_block_types",
        "layers_per_block",
        "latent_channels",
        "norm_num_groups",
        "sample_size",
        "mid_block_add_attention",
    )
    plain = AutoencoderKL(
        **{name: given.config[name] for name in names},
        scaling_factor=1 / latents.std().item(),
        shift_factor=latents.mean().item(),
    )
    weights = {name: one for name, one in given.state_dict().items() if not name.startswith("bn.")}
    plain.load_state_dict(weights)
    return plain.eval().requires_grad_(False)


def new_transformer(seed: int) -> ZImageTransformer2DModel:
    """With weights drawn from the seed."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=vae.LATENT_CHANNELS,
        dim=128,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=HIDDEN,
        rope_theta=dit.ROPE_THETA,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 64, 64],
    )
    for name, weight in transformer.named_parameters():
        if name.startswith("all_final_layer.2-1.linear"):
            nn.init.zeros_(weight)
        elif name.endswith("pad_token") or ("adaLN" in name and weight.ndim == 2):
            nn.init.normal_(weight, std=0.02)
        elif weight.ndim == 2:
            nn.init.xavier_uniform_(weight)
    return transformer


def optimizers(transformer: ZImageTransformer2DModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    return muon_and_adamw(transformer, ("layers.", "noise_refiner.", "context_refiner."), dit.LEARNING_RATE)


class Lesson:
    """Encoded pictures, their captions' embeddings, and the loss on a batch of them.

    path: where they are kept, so that --resume need not encode again.
    """

    def __init__(self, pipeline: ZImagePipeline, pictures: int, seed: int, path: Path) -> None:
        kept = kept_in(path, lambda: _encoded(pipeline, pictures, seed))
        self.tokens, self.numbers = kept["tokens"], kept["numbers"]
        self.captions, self.padding = kept["captions"], kept["padding"]
        self.turned = turns(pipeline.transformer, SIZE_PX // 8)

    def loss_of(self, transformer: Any, generator: Generator, half: bool) -> Tensor:
        """Mean squared error of one batch. Z-Image is told 1 - sigma and says x0 - noise. half: in bf16."""
        chosen = torch.randint(len(self.tokens), (dit.BATCH,), generator=generator)
        clean = self.tokens[chosen]
        emptied = torch.rand(dit.BATCH, generator=generator) < dit.EMPTY_CAPTIONS
        said = torch.where(emptied, len(self.captions) - 1, self.numbers[chosen])
        noisy, sigma, noise = dit.noised(clean, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            drawn = velocity(
                transformer,
                noisy,
                1 - sigma,
                self.captions[said],
                self.padding[said],
                self.turned,
            )
        return F.mse_loss(drawn.float(), clean - noise)


@torch.no_grad()
def _encoded(pipeline: ZImagePipeline, pictures: int, seed: int) -> dict[str, Tensor]:
    """tokens (n, 64, 32) and numbers (n) of their captions; captions (m, 32, 48), the empty one last; padding (m, 32)."""
    drawings = draw_set(pictures, seed, held_out=False)
    said = sorted({one.caption for one in drawings})
    number = {caption: i for i, caption in enumerate(said)}
    captions, padding = padded(embed(pipeline, [*said, ""]))
    autoencoder = pipeline.vae
    latents = torch.cat(
        [
            autoencoder.encode(
                torch.stack([vae.as_tensor(one.image) for one in drawings[i : i + 128]])
            ).latent_dist.mode()
            for i in range(0, pictures, 128)
        ]
    )
    config = autoencoder.config
    return {
        "tokens": tokens_of((latents - config.shift_factor) * config.scaling_factor),
        "numbers": torch.tensor([number[one.caption] for one in drawings]),
        "captions": captions,
        "padding": padding,
    }


def embed(pipeline: ZImagePipeline, captions: Sequence[str]) -> list[Tensor]:
    """(tokens, 48) of each caption, by the pipeline's own code."""
    found: list[Tensor] = []
    for start in range(0, len(captions), 256):
        some = list(captions[start : start + 256])
        found += pipeline.encode_prompt(
            some, do_classifier_free_guidance=False, max_sequence_length=CAPTION_TOKENS
        )[0]
    return found


@torch.no_grad()
def draw_each(pipeline: ZImagePipeline, captions: Sequence[str], seed: int, batch: int = 32) -> list[Image]:
    """One 64x64 picture a caption. The noise of picture i is a function of (seed, i), whatever the batch size."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image] = []
    for start in range(0, len(captions), batch):
        some = list(captions[start : start + batch])
        noise = generators(seed, range(start, start + len(some)))
        images += pipeline(
            prompt=some,
            height=SIZE_PX,
            width=SIZE_PX,
            num_inference_steps=STEPS,
            guidance_scale=CFG - 1,  # the pipeline counts guidance from 0, cfg counts from 1
            max_sequence_length=CAPTION_TOKENS,
            generator=noise,
        ).images
    return images


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = arguments("whitetuner.nano.pretrain_zimage", "Train a small Z-Image from nothing.")
    parser.add_argument("--steps", type=int, default=STEPS_PLANNED, help="in all")
    return parser.parse_args(words)


if __name__ == "__main__":
    raise SystemExit(main())
