"""The embedded model from nothing: autoencoder, text encoder, transformer, saved as a pipeline in bf16.

    python -m whitetuner.nano.pretrain --out DIR [--minutes M] [--threads N] [--seed S] [--resume]
                                       [--stage vae|decoder|dit|edges|all] [--float32] [--compile]

DIR/model is the folder (shipped as whitetuner/nano/model), DIR/state what --resume goes on from. Stopped by
--minutes, it leaves a folder that draws as well as the training got; the model card inside says how far and
how well that was. `decoder` (finer edges) and `dit` both build on `vae` alone, so they may run side by side;
`edges` builds on both.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from torch import Generator, Tensor

from whitetuner.errors import UserError
from whitetuner.family import WISHES
from whitetuner.nano import dit, edges, text, vae
from whitetuner.nano.builtin import MAX_SEQUENCE_LENGTH
from whitetuner.nano.card import Reconstruction, Training, write_card
from whitetuner.nano.check import judge
from whitetuner.nano.draw import NEW_SHAPE, NEW_WORD, SIZE_PX, all_captions, draw_set
from whitetuner.nano.fit import Fit, Plan
from whitetuner.nano.score import draw_with, evaluation_prompts, load_pipeline, score

VAE_PLAN = Plan(steps=5000, warmup=50, decay=0.5, ema=0.998)
DECODER_PLAN = Plan(steps=2000, warmup=50, decay=0.6, ema=0.998)
DIT_PLAN = Plan(steps=2700, warmup=100, decay=0.36, ema=0.998)
EDGES_PLAN = Plan(steps=1000, warmup=50, decay=0.7, ema=0.995)
#: The last steps run in float32, to end where the pipeline computes.
HALF_SHARE = 0.85
#: Pictures a score is taken from: at 95 % its standard error is 1.5 points.
SCORED = 200
SCORE_SEED = 2024


def main(words: list[str] | None = None) -> int:
    options = _options(words)
    return exit_code(lambda: pretrain(options))


def pretrain(options: argparse.Namespace) -> None:
    """Raises UserError for a folder with a training in it and no --resume, and for a stage without its
    autoencoder.
    """
    begin(options)
    run = _Run(options)
    whole = run.autoencoder()
    if whole is None:
        return
    decoder = run.decoder(whole)
    tokenizer = text.new_tokenizer()
    encoder = text.new_text_encoder(len(tokenizer), options.seed)

    def embed(captions: list[str]) -> Tensor:
        return text.embed(encoder, tokenizer, captions)

    transformer = run.transformer(whole, embed)
    if options.stage in ("vae", "decoder") and not run.trainings[-1].steps:
        return
    finished = run.edges(whole, decoder, transformer, embed)
    folder = options.out / "model"
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=finished,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=False,
    )
    save(pipeline, folder, MAX_SEQUENCE_LENGTH)
    pipeline = load_pipeline(folder)
    drawn_back = reconstruction(pipeline.vae, options.seed)
    print(drawn_back, flush=True)
    scores = {}
    for name, seed, choice in (
        ("fresh captions", SCORE_SEED, {}),
        ("combinations never trained on", SCORE_SEED + 1, {"held_out": True}),
        ("the new word, never trained on", SCORE_SEED + 2, {"shapes": (NEW_SHAPE,), "word": NEW_WORD}),
    ):
        captions, labels = evaluation_prompts(SCORED, seed, **choice)
        scores[name] = score(draw_with(pipeline, captions, seed), labels)
        print(name, scores[name], flush=True)
    write_card(folder, options.seed, run.trainings, drawn_back, scores)


class _Run:
    """The stages of one call: each goes on from its file if it is asked for, else is taken as the file has it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + 60 * options.minutes
        self.trainings: list[Training] = []

    def autoencoder(self) -> AutoencoderKLFlux2 | None:
        """With its statistics, in the precision it is shipped in; None while it is unfinished."""
        model = vae.new_vae(self.options.seed)
        fit = self._fit("vae", model, vae.optimizers(model), VAE_PLAN)
        self._train(fit, lambda generator, half: vae.loss_of(model, generator, half), ("vae", "all"))
        if fit.progress.step < VAE_PLAN.steps:
            if self.options.stage in ("decoder", "dit"):
                raise UserError(
                    "the autoencoder is not finished ({step} of {steps} steps)",
                    mend="Run with --stage vae --resume, or --stage all, first.",
                    step=fit.progress.step,
                    steps=VAE_PLAN.steps,
                )
            return None
        finished = fit.averaged(vae.new_vae(self.options.seed))
        vae.set_latent_statistics(finished, self.options.seed)
        return finished.to(torch.bfloat16).float()

    def decoder(self, whole: AutoencoderKLFlux2) -> AutoencoderKLFlux2:
        """The same autoencoder with its decoder as far as it got."""
        model = copy.deepcopy(whole)
        fit = self._fit("decoder", model, vae.decoder_optimizers(model), DECODER_PLAN)
        self._train(
            fit,
            lambda generator, half: vae.decoder_loss_of(model, generator, half),
            ("vae", "decoder", "all"),
        )
        return fit.averaged(copy.deepcopy(whole))

    def transformer(
        self, whole: AutoencoderKLFlux2, embed: Callable[[list[str]], Tensor]
    ) -> dit.Flux2Transformer2DModel:
        model = dit.new_transformer(self.options.seed)
        fit = self._fit("dit", model, dit.optimizers(model), DIT_PLAN)
        if self.options.stage in ("dit", "all"):
            captions = [*all_captions(), ""]
            lesson = dit.Lesson(whole, captions, embed(captions), self.options.seed)
            forward = torch.compile(model) if self.options.compile else model
            self._train(fit, lambda generator, half: lesson.loss_of(forward, generator, half), ("dit", "all"))
        else:
            self._train(fit, None, ())
        return fit.averaged(dit.new_transformer(self.options.seed))

    def edges(
        self,
        whole: AutoencoderKLFlux2,
        decoder: AutoencoderKLFlux2,
        transformer: dit.Flux2Transformer2DModel,
        embed: Callable[[list[str]], Tensor],
    ) -> AutoencoderKLFlux2:
        """decoder, finished on what the transformer makes. Waits for a finished transformer."""
        drawn_by = self.trainings[-1]
        if self.options.stage == "edges" and drawn_by.steps < drawn_by.planned:
            raise UserError(
                "the transformer is not finished ({step} of {steps} steps)",
                mend="Run with --stage dit --resume, or --stage all, first.",
                step=drawn_by.steps,
                steps=drawn_by.planned,
            )
        model = copy.deepcopy(decoder)
        fit = self._fit("edges", model, edges.optimizers(model), EDGES_PLAN)
        if self.options.stage in ("edges", "all") and drawn_by.steps == drawn_by.planned:
            captions = [*all_captions(), ""]
            lesson = edges.Lesson(whole, transformer, captions, embed(captions), self.options.seed)
            self._train(fit, lambda generator, half: lesson.loss_of(model, generator, half), ("edges", "all"))
        else:
            self._train(fit, None, ())
        return fit.averaged(copy.deepcopy(decoder))

    def _fit(
        self, name: str, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], plan: Plan
    ) -> Fit:
        fit = Fit(name, model, optimizers, plan, self.options.out / "state" / f"{name}.pt")
        fit.load()
        return fit

    def _train(
        self, fit: Fit, loss_of: Callable[[Generator, bool], Tensor] | None, stages: tuple[str, ...]
    ) -> None:
        if loss_of is not None and self.options.stage in stages:
            border = HALF_SHARE * fit.plan.steps if self.options.half else 0
            fit.run(
                lambda generator, step: loss_of(generator, step < border), self.options.seed, self.deadline
            )
        self.trainings.append(Training(fit.name, fit.progress.step, fit.plan.steps, fit.progress.seconds))


def reconstruction(model: AutoencoderKLFlux2, seed: int) -> Reconstruction:
    """Of 200 drawings of the known shapes (error and recognition) and 200 of the new one."""
    recognised, errors = [], []
    for drawings in (draw_set(200, seed + 1), draw_set(200, seed + 2, (NEW_SHAPE,))):
        pictures = torch.stack([vae.as_tensor(drawing.image) for drawing in drawings])
        back = vae.reconstruct(model, pictures).clamp(-1, 1)
        errors.append((back - pictures).square().mean().sqrt().item())
        images = ((back + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        right = [judge(image, drawing.label).all for image, drawing in zip(images, drawings, strict=True)]
        recognised.append(sum(right) / len(right))
    return Reconstruction(errors[0], *recognised)


def exit_code(act: Callable[[], None]) -> int:
    """0, or the code of what was told on standard error."""
    try:
        act()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


def kept_in(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What was made once and is read from then on."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    kept: dict[str, Tensor] = torch.load(path, weights_only=True)
    return kept


def save(
    pipeline: Any,
    folder: Path,
    max_sequence_length: int | None,
    size: tuple[int, int, int] = (SIZE_PX, SIZE_PX, 1),
) -> None:
    """In bf16, as the package has it, with what a config of it should say. size: width, height, frames."""
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    wishes = {"options": options, "size": list(size)}
    (folder / WISHES).write_text(json.dumps(wishes, indent=1) + "\n", encoding="utf-8")


def begin(options: argparse.Namespace) -> None:
    """The threads that were asked for. Raises UserError for a folder with a training in it and no --resume."""
    torch.set_num_threads(options.threads)
    if (options.out / "state").exists() and not options.resume:
        raise UserError(
            "{folder} holds the state of a training",
            mend="Add --resume to go on with it, or choose another --out.",
            folder=options.out,
        )


def arguments(module: str, description: str) -> argparse.ArgumentParser:
    """What every training from nothing is asked with."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    option = parser.add_argument
    option("--out", type=Path, required=True, help="folder for the model and the training's state")
    option("--minutes", type=float, default=float("inf"), help="stop after that long (--resume goes on)")
    option("--threads", type=int, default=2)
    option("--seed", type=int, default=0)
    option("--resume", action="store_true", help="go on from the state in --out")
    option(
        "--float32",
        dest="half",
        action="store_false",
        help="for processors without bf16 arithmetic: the same, slower",
    )
    return parser


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = arguments("whitetuner.nano.pretrain", "Train the embedded model from nothing.")
    option = parser.add_argument
    option("--stage", choices=("vae", "decoder", "dit", "edges", "all"), default="all")
    option(
        "--compile",
        action="store_true",
        help="torch.compile the transformer: a fifth faster, needs a C++ compiler",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    raise SystemExit(main())
