"""The embedded model from nothing: autoencoder, text encoder, transformer, saved as a pipeline in bf16.

    python -m whitetuner.nano.pretrain --out DIR [--minutes M] [--threads N] [--seed S]
                                       [--stage vae|dit|all] [--resume]

DIR/model is the folder (shipped as whitetuner/nano/model), DIR/state what --resume goes on from. Stopped by
--minutes, it leaves a folder that draws as well as the training got; the model card inside says how far and
how well that was.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)

from whitetuner.errors import UserError
from whitetuner.nano import dit, text, vae
from whitetuner.nano.card import Reconstruction, Training, write_card
from whitetuner.nano.check import judge
from whitetuner.nano.draw import NEW_SHAPE, NEW_WORD, all_captions, draw_set
from whitetuner.nano.fit import Fit, Plan
from whitetuner.nano.score import draw_with, evaluation_prompts, load_pipeline, score

VAE_PLAN = Plan(steps=5000, warmup=50, decay=0.5, ema=0.998)
DIT_PLAN = Plan(steps=9000, warmup=100, decay=0.4, ema=0.998)
#: The last steps run in float32, to end where the pipeline computes.
HALF_SHARE = 0.85
#: Pictures a score is taken from: at 95 % its standard error is 1.5 points.
SCORED = 200
SCORE_SEED = 2024


def main(words: list[str] | None = None) -> int:
    try:
        pretrain(_options(words))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


def pretrain(options: argparse.Namespace) -> None:
    """Raises UserError for a folder with a training in it and no --resume, and for --stage dit without an
    autoencoder.
    """
    torch.set_num_threads(options.threads)
    state = options.out / "state"
    if state.exists() and not options.resume:
        raise UserError(
            "{folder} holds the state of a training",
            mend="Add --resume to go on with it, or choose another --out.",
            folder=options.out,
        )
    deadline = time.monotonic() + 60 * options.minutes
    autoencoder, drawn_back, vae_training = _autoencoder(options, state / "vae.pt", deadline)
    if options.stage == "vae" or not vae_training.done:
        return
    tokenizer = text.new_tokenizer()
    encoder = text.new_text_encoder(len(tokenizer), options.seed)
    transformer, dit_training = _transformer(
        options, state / "dit.pt", deadline, autoencoder, encoder, tokenizer
    )
    folder = options.out / "model"
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=False,
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    pipeline = load_pipeline(folder)
    scores = {}
    for name, seed, choice in (
        ("fresh captions", SCORE_SEED, {}),
        ("combinations never trained on", SCORE_SEED + 1, {"held_out": True}),
        ("the new word, never trained on", SCORE_SEED + 2, {"shapes": (NEW_SHAPE,), "word": NEW_WORD}),
    ):
        captions, labels = evaluation_prompts(SCORED, seed, **choice)
        scores[name] = score(draw_with(pipeline, captions, seed), labels)
        print(name, scores[name], flush=True)
    write_card(folder, options.seed, options.threads, [vae_training, dit_training], drawn_back, scores)


def _autoencoder(
    options: argparse.Namespace, path: Path, deadline: float
) -> tuple[AutoencoderKLFlux2, Reconstruction, Training]:
    model = vae.new_vae(options.seed)
    fit = Fit("vae", model, vae.optimizers(model), VAE_PLAN, path)
    fit.load()
    if options.stage == "dit" and fit.progress.step < VAE_PLAN.steps:
        raise UserError(
            "the autoencoder is not finished ({step} of {steps} steps)",
            mend="Run with --stage vae --resume, or --stage all, first.",
            step=fit.progress.step,
            steps=VAE_PLAN.steps,
        )
    done = fit.run(
        lambda generator, step: vae.loss_of(
            model, generator, options.half and step < HALF_SHARE * VAE_PLAN.steps
        ),
        options.seed,
        deadline,
    )
    averaged = fit.averaged(vae.new_vae(options.seed))
    vae.set_latent_statistics(averaged, options.seed)
    averaged = averaged.to(torch.bfloat16).float()  # the transformer learns the latents of what is shipped
    drawn_back = _reconstruction(averaged, options.seed)
    print(drawn_back, flush=True)
    return (
        averaged,
        drawn_back,
        Training("autoencoder", fit.progress.step, VAE_PLAN.steps, fit.progress.seconds, done),
    )


def _reconstruction(model: AutoencoderKLFlux2, seed: int) -> Reconstruction:
    recognised = []
    rmse = 0.0
    for drawings in (draw_set(200, seed + 1), draw_set(200, seed + 2, (NEW_SHAPE,))):
        pictures = torch.stack([vae.as_tensor(drawing.image) for drawing in drawings])
        back = vae.reconstruct(model, pictures).clamp(-1, 1)
        rmse = rmse or (back - pictures).square().mean().sqrt().item()
        images = ((back + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        right = [judge(image, drawing.label).all for image, drawing in zip(images, drawings, strict=True)]
        recognised.append(sum(right) / len(right))
    return Reconstruction(rmse, *recognised)


def _transformer(
    options: argparse.Namespace,
    path: Path,
    deadline: float,
    autoencoder: AutoencoderKLFlux2,
    encoder: torch.nn.Module,
    tokenizer: object,
) -> tuple[Flux2Transformer2DModel, Training]:
    model = dit.new_transformer(options.seed)
    fit = Fit("dit", model, dit.optimizers(model), DIT_PLAN, path)
    fit.load()
    captions = [*all_captions(), ""]
    lesson = dit.Lesson(autoencoder, captions, text.embed(encoder, tokenizer, captions), options.seed)
    done = fit.run(
        lambda generator, step: lesson.loss_of(
            model, generator, options.half and step < HALF_SHARE * DIT_PLAN.steps
        ),
        options.seed,
        deadline,
    )
    averaged = fit.averaged(dit.new_transformer(options.seed))
    return averaged, Training("transformer", fit.progress.step, DIT_PLAN.steps, fit.progress.seconds, done)


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m whitetuner.nano.pretrain", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model and the training's state"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after that long (--resume goes on)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("vae", "dit", "all"), default="all")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument(
        "--float32",
        dest="half",
        action="store_false",
        help="for processors without bf16 arithmetic: the same, slower",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    raise SystemExit(main())
