"""A small WAN that makes a picture move as it is told: autoencoder, then transformer, from nothing.

    python -m whitetuner.nano.pretrain_wan --out DIR [--minutes M] [--threads N] [--seed S] [--resume]
                                           [--stage vae|all] [--steps N] [--float32]

DIR/model is the folder (a `WanImageToVideoPipeline` in bf16), DIR/state what --resume goes on from. Where time runs out, --resume
with fewer --steps lets the transformer's learning rate fall from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL.Image import Image

from whitetuner.nano import wan_dit, wan_parts, wan_vae
from whitetuner.nano.builtin import STEPS
from whitetuner.nano.card import WAN, Training, write_small_card
from whitetuner.nano.fit import Fit, Plan
from whitetuner.nano.motions import (
    FRAMES,
    KINDS,
    NEW_KIND,
    SIDE_PX,
    Clip,
    caption_of,
    clips,
    frames,
    right_clip,
)
from whitetuner.nano.pretrain import arguments, begin, exit_code, save
from whitetuner.nano.score import generators

VAE_PLAN = Plan(steps=1800, warmup=30, decay=0.55, ema=0.995)
STEPS_PLANNED = 2000
#: The autoencoder's last steps run in float32, to end where the pipeline computes.
HALF_SHARE = 0.9
CLIPS = 5600
SCORED = 224
SCORE_SEED = 2024


def main(words: list[str] | None = None) -> int:
    options = _options(words)
    return exit_code(lambda: pretrain(options, VAE_PLAN, plan_of(options.steps)))


def plan_of(steps: int) -> Plan:
    return Plan(steps=steps, warmup=100, decay=0.4, ema=0.995)


def pretrain(
    options: argparse.Namespace, first: Plan, plan: Plan, count: int = CLIPS, n: int = SCORED
) -> None:
    """first: the autoencoder's plan. Raises UserError for a folder with a training in it and no --resume."""
    begin(options)
    deadline = time.monotonic() + 60 * options.minutes
    autoencoder, before = _autoencoder(options, first, deadline)
    if autoencoder is None or options.stage == "vae":
        return
    pipeline = new_pipeline(autoencoder, options.seed)
    model = pipeline.transformer
    lesson = wan_dit.Lesson(pipeline, count, options.seed, options.out / "state" / "lesson.pt")
    fit = Fit("wan", model, wan_dit.optimizers(model), plan, options.out / "state" / "wan.pt")
    fit.load()
    fit.run(lambda generator, step: lesson.loss_of(model, generator), options.seed, deadline)
    fit.averaged(model)
    folder = options.out / "model"
    save(pipeline, folder, None, (SIDE_PX, SIDE_PX, FRAMES))
    index = folder / "model_index.json"
    document = json.loads(index.read_text(encoding="utf-8"))
    document["image_processor"] = ["transformers", "CLIPImageProcessor"]  # what released folders say
    index.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    pipeline.to(torch.float32)
    training = Training(fit.name, fit.progress.step, plan.steps, fit.progress.seconds)
    found = {**scores(pipeline, n, SCORE_SEED), **scores(pipeline, n // 4, SCORE_SEED + 1, (NEW_KIND,))}
    shown = {_row(kind): share for kind, share in found.items()}
    write_small_card(folder, WAN, options.seed, training, fit.progress.loss, n, shown, before)


def _row(kind: str) -> str:
    if kind == "all":
        return "all, in turn"
    return caption_of(kind) + ", never trained on (a quarter as many)" * (kind == NEW_KIND)


def _autoencoder(
    options: argparse.Namespace, plan: Plan, deadline: float
) -> tuple[AutoencoderKLWan | None, Training]:
    """With its latents' moments, in the precision it is shipped in; None while it is unfinished."""
    model = wan_vae.new_vae(options.seed)
    fit = Fit("vae", model, wan_vae.optimizers(model), plan, options.out / "state" / "vae.pt")
    fit.load()
    border = HALF_SHARE * plan.steps if options.half else 0
    done = fit.run(
        lambda generator, step: wan_vae.loss_of(model, generator, step < border), options.seed, deadline
    )
    training = Training(fit.name, fit.progress.step, plan.steps, fit.progress.seconds)
    if not done:
        return None, training
    finished = fit.averaged(wan_vae.new_vae(options.seed)).to(torch.bfloat16).float()
    return wan_vae.measured(finished, options.seed), training


def new_pipeline(autoencoder: AutoencoderKLWan, seed: int) -> WanImageToVideoPipeline:
    """Around an untrained transformer, float32."""
    tokenizer = wan_parts.new_tokenizer()
    return WanImageToVideoPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=wan_dit.SHIFT,
        ),
        vae=autoencoder,
        text_encoder=wan_parts.new_text_encoder(len(tokenizer), seed),
        tokenizer=tokenizer,
        image_encoder=wan_parts.new_image_encoder(seed),
        image_processor=wan_parts.new_image_processor(),
        transformer=wan_dit.new_transformer(seed),
    )


def scores(
    pipeline: WanImageToVideoPipeline, n: int, seed: int, kinds: tuple[str, ...] = KINDS
) -> dict[str, float]:
    """Share of n clips that came out right, by kind and of all."""
    asked = clips(n, seed, kinds)
    verdicts = [
        right_clip(drawn, clip) for drawn, clip in zip(animate(pipeline, asked, seed), asked, strict=True)
    ]
    found = {}
    for kind in kinds:
        some = [verdict for verdict, clip in zip(verdicts, asked, strict=True) if clip.kind == kind]
        if some:
            found[kind] = sum(some) / len(some)
    return {**found, "all": sum(verdicts) / n} if len(kinds) > 1 else found


@torch.no_grad()
def animate(
    pipeline: WanImageToVideoPipeline, asked: Sequence[Clip], seed: int, batch: int = 32, steps: int = STEPS
) -> list[list[Image]]:
    """Five 48x48 frames a clip, as the pipeline draws them without guidance, each clip with a first frame of its own.

    The noise of clip i is a function of (seed, i), whatever the batch size.
    """
    drawn: list[list[Image]] = []
    scheduler, mean, deviation = pipeline.scheduler, *wan_dit.moments(pipeline.vae)
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        first = frames(some)[:, 0]
        texts = wan_dit.shortened(wan_parts.embed(pipeline, [clip.caption for clip in some]))
        known, seen = wan_dit.condition(pipeline, first), wan_parts.seen(pipeline, first)
        noise = generators(seed, range(start, start + len(some)))
        shape = (wan_vae.CHANNELS, *known.shape[2:])
        latents = torch.stack([torch.randn(shape, generator=one) for one in noise])
        scheduler.set_timesteps(steps)
        for clock in scheduler.timesteps:
            sigma = (clock / 1000).expand(len(some))
            said = wan_dit.velocity(pipeline.transformer, latents, sigma, known, texts, seen)
            latents = scheduler.step(said, clock, latents, return_dict=False)[0]
        film = pipeline.vae.decode(latents * deviation + mean, return_dict=False)[0]
        drawn += pipeline.video_processor.postprocess_video(film, output_type="pil")
    return drawn


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = arguments("whitetuner.nano.pretrain_wan", "Train a small WAN from nothing.")
    parser.add_argument("--stage", choices=("vae", "all"), default="all")
    parser.add_argument("--steps", type=int, default=STEPS_PLANNED, help="of the transformer, in all")
    return parser.parse_args(words)


if __name__ == "__main__":
    raise SystemExit(main())
