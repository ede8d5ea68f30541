"""A small Klein that edits: the embedded model's transformer, trained on with a reference beside the picture.

    python -m whitetuner.nano.pretrain_edit --out DIR [--minutes M] [--threads N] [--seed S] [--resume]
                                            [--steps N] [--float32]

DIR/model is the folder, in bf16; its autoencoder and text path are the embedded model's, untouched. DIR/state is what
--resume goes on from; where time runs out, --resume with fewer --steps lets the learning rate fall from there.

The reference is the given picture's clean latent, its tokens after the picture's and at time 10, as the pipeline has it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline
from PIL import Image as images_of
from PIL.Image import Image
from torch import Generator, Tensor

from whitetuner.nano import dit, vae
from whitetuner.nano.builtin import MAX_SEQUENCE_LENGTH, STEPS
from whitetuner.nano.card import EDIT, Training, write_small_card
from whitetuner.nano.draw import SIZE_PX
from whitetuner.nano.edits import KINDS, NEW_KIND, Edit, Scene, edited, instructions, pictures, right, scenes
from whitetuner.nano.edits import edits as edits_of
from whitetuner.nano.fit import Fit, Plan
from whitetuner.nano.pretrain import arguments, begin, exit_code, kept_in, save
from whitetuner.nano.score import load_pipeline
from whitetuner.nano.text import embed

STEPS_PLANNED = 1500
BATCH = 24
#: Of the learning rate that the embedded model began with.
RATE = 0.5
HALF_SHARE = 0.9
SCENES = 1400
SCORED = 192
SCORE_SEED = 2024
REFERENCE_TIME = 10
_ROWS = {
    "colour": "make it COLOUR",
    "background": "make the background COLOUR",
    "mirror": "mirror it",
    "all": "all three, in turn",
    NEW_KIND: f"{NEW_KIND} it, never trained on (a third as many)",
}


def main(words: list[str] | None = None) -> int:
    options = _options(words)
    return exit_code(lambda: pretrain(options, plan_of(options.steps)))


def plan_of(steps: int) -> Plan:
    return Plan(steps=steps, warmup=50, decay=0.6, ema=0.995)


def pretrain(options: argparse.Namespace, plan: Plan, count: int = SCENES, n: int = SCORED) -> None:
    """Raises UserError for a folder with a training in it and no --resume."""
    begin(options)
    deadline = time.monotonic() + 60 * options.minutes
    pipeline = load_pipeline()
    model = pipeline.transformer.train().requires_grad_(True)
    lesson = Lesson(pipeline, count, options.seed, options.out / "state" / "pairs.pt")
    optimizers = dit.optimizers(model)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= RATE
    fit = Fit("edit", model, optimizers, plan, options.out / "state" / "edit.pt")
    fit.load()
    border = HALF_SHARE * plan.steps if options.half else 0
    fit.run(lambda generator, step: lesson.loss_of(model, generator, step < border), options.seed, deadline)
    fit.averaged(model)
    folder = options.out / "model"
    save(pipeline, folder, MAX_SEQUENCE_LENGTH)
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        # Where the embedded model lay on this machine is nobody's matter.
        settings = json.loads(file.read_text(encoding="utf-8"))
        del settings["_name_or_path"]
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    pipeline.to(torch.float32)
    found = {**scores(pipeline, n, SCORE_SEED), **scores(pipeline, n // 3, SCORE_SEED + 1, (NEW_KIND,))}
    training = Training(fit.name, fit.progress.step, plan.steps, fit.progress.seconds)
    shown = {_ROWS[kind]: share for kind, share in found.items()}
    write_small_card(folder, EDIT, options.seed, training, fit.progress.loss, n, shown)


class Lesson:
    """Encoded pairs, the instructions' embeddings, and the loss on a batch of them.

    path: where they are kept, so that --resume need not encode again.
    """

    def __init__(self, pipeline: Flux2KleinPipeline, count: int, seed: int, path: Path) -> None:
        kept = kept_in(path, lambda: _encoded(pipeline, count, seed))
        self.tokens, self.pairs, self.embeddings = kept["tokens"], kept["pairs"], kept["embeddings"]
        image, self.text_ids = dit.position_ids()
        reference = image.clone()
        reference[:, 0] = REFERENCE_TIME
        self.image_ids = torch.cat([image, reference])

    def loss_of(self, transformer: Any, generator: Generator, half: bool) -> Tensor:
        """Mean squared error of one batch's velocity, of the picture alone. half: in bf16."""
        given, wanted, said = self.pairs[torch.randint(len(self.pairs), (BATCH,), generator=generator)].T
        emptied = torch.rand(BATCH, generator=generator) < dit.EMPTY_CAPTIONS
        said = torch.where(emptied, len(self.embeddings) - 1, said)
        clean = self.tokens[wanted]
        noisy, sigma, noise = dit.noised(clean, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            velocity = transformer(
                hidden_states=torch.cat([noisy, self.tokens[given]], 1),
                timestep=sigma,
                guidance=None,
                encoder_hidden_states=self.embeddings[said],
                txt_ids=self.text_ids,
                img_ids=self.image_ids,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity[:, : clean.shape[1]].float(), noise - clean)


@torch.no_grad()
def _encoded(pipeline: Flux2KleinPipeline, count: int, seed: int) -> dict[str, Tensor]:
    """tokens (n, 64, 32) of the pictures, pairs (m, 3) of given, wanted, instruction; embeddings, the empty one last.

    A scene is drawn four times: as it is, and edited in each of three ways; each edit is learned there and back.
    """
    said = instructions()
    number = {words: i for i, words in enumerate(said)}
    rng = np.random.default_rng((seed, 2))
    drawn: list[Scene] = []
    pairs: list[tuple[int, int, int]] = []
    for scene, _ in zip(scenes(seed + 1), range(count), strict=False):
        ways = [edited(scene, kind, rng) for kind in KINDS]
        at = len(drawn)
        drawn += [scene, *(one.wanted for one in ways)]
        back = (f"make it {scene.colour}", f"make the background {scene.background}", "mirror it")
        for i, (way, words) in enumerate(zip(ways, back, strict=True), 1):
            pairs += [(at, at + i, number[way.instruction]), (at + i, at, number[words])]
    images = pictures(drawn)
    tokens = [
        vae.latent_tokens(pipeline.vae, torch.stack([vae.as_tensor(one) for one in images[i : i + 128]]))
        for i in range(0, len(images), 128)
    ]
    return {
        "tokens": torch.cat(tokens),
        "pairs": torch.tensor(pairs),
        "embeddings": embed(pipeline.text_encoder, pipeline.tokenizer, [*said, ""]),
    }


def scores(
    pipeline: Flux2KleinPipeline, n: int, seed: int, kinds: tuple[str, ...] = KINDS
) -> dict[str, float]:
    """Share of n edits that came out right, by kind and of all."""
    asked = edits_of(n, seed, kinds)
    drawn = edit_with(pipeline, asked, seed)
    verdicts = [right(picture, edit) for picture, edit in zip(drawn, asked, strict=True)]
    found = {}
    for kind in kinds:
        some = [verdict for verdict, edit in zip(verdicts, asked, strict=True) if edit.kind == kind]
        found[kind] = sum(some) / len(some)
    return {**found, "all": sum(verdicts) / n} if len(kinds) > 1 else found


@torch.no_grad()
def edit_with(pipeline: Flux2KleinPipeline, asked: list[Edit], seed: int, batch: int = 32) -> list[Image]:
    """One 64x64 picture an edit, without guidance: what the instruction asks for is in no picture without it."""
    images: list[Image] = []
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        given = torch.stack([vae.as_tensor(one) for one in pictures([edit.given for edit in some])])
        images += _References.around(pipeline, vae.latent_tokens(pipeline.vae, given))(
            image=_ANY,
            prompt=[edit.instruction for edit in some],
            height=SIZE_PX,
            width=SIZE_PX,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(some))],
        ).images
    return images


#: Makes the pipeline ask for reference latents.
_ANY = images_of.new("RGB", (SIZE_PX, SIZE_PX))


class _References(Flux2KleinPipeline):
    """A reference of its own for each picture of a batch, where the pipeline has the same for all."""

    references: Tensor

    @classmethod
    def around(cls, pipeline: Flux2KleinPipeline, references: Tensor) -> _References:
        own = cls(**pipeline.components, is_distilled=False)
        own.references = references
        own.set_progress_bar_config(disable=True)
        return own

    def prepare_image_latents(
        self, images: Any, batch_size: int, generator: Any, device: Any, dtype: Any
    ) -> tuple[Tensor, Tensor]:
        ids, _ = dit.position_ids()
        ids = ids.clone()
        ids[:, 0] = REFERENCE_TIME
        return self.references, ids.expand(batch_size, -1, -1)


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = arguments("whitetuner.nano.pretrain_edit", "Train the embedded model on, to edit.")
    parser.add_argument("--steps", type=int, default=STEPS_PLANNED, help="in all")
    return parser.parse_args(words)


if __name__ == "__main__":
    raise SystemExit(main())
