"""The model card of the embedded model: what it is, how it was made, how well it draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from whitetuner.nano.builtin import CFG, MAX_SEQUENCE_LENGTH, STEPS
from whitetuner.nano.check import CLEAN_EDGE_PX
from whitetuner.nano.score import Score
from whitetuner.version import __version__


@dataclass(frozen=True)
class Training:
    """One stage. seconds: wall time of its steps."""

    name: str
    steps: int
    planned: int
    seconds: float


@dataclass(frozen=True)
class Reconstruction:
    """The autoencoder alone. rmse: of pixels in [-1, 1]; known, new: share of pictures the checker still
    recognises.
    """

    rmse: float
    known: float
    new: float


_TEXT = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# Nano

A FLUX.2 Klein pipeline small enough to ship inside White Tuner {version}: `Flux2KleinPipeline` with the
ordinary classes, made small. It draws one flat shape on a flat background, 64x64, as its caption says:
circle, square, triangle, cross, star or ring; eight colours; small or big.

Trained from scratch on pictures that `whitetuner.nano.draw` draws; nothing else went into it. Seed {seed}:

    python -m whitetuner.nano.pretrain --out DIR

| stage | steps | seconds (wall time) |
|---|---|---|
{stages}

The autoencoder's error is {rmse:.3f} (root mean square, pixels in [-1, 1]); the checker recognises
{known:.1%} of its reconstructions, and {new:.1%} of those of an outline it was never trained on.

Scores of the files beside this card, {steps} steps, guidance {cfg:g}, `max_sequence_length={length}` (which
it needs: padding is attended to, and another length is new to it). Fit: overlap with the nearest ideal
outline (drawings have .99). An edge counts as clean up to {edge:g} px wide (drawings have 1);
that width is part of the loss of the stage `edges`, shapes and colours as the checker sees them of none.

| captions | pictures | all right | shape | colour | background | fit | edge (px) | clean edges |
|---|---|---|---|---|---|---|---|---|
{scores}
"""


def write_card(
    folder: Path,
    seed: int,
    stages: list[Training],
    drawn_back: Reconstruction,
    scores: dict[str, Score],
) -> None:
    """Writes folder/README.md. scores: what the captions were -> how they came out."""
    rows = [
        f"| {name} | {s.n} | {s.all:.1%} | {s.shape:.1%} | {s.colour:.1%} | {s.background:.1%} "
        f"| {s.fit:.3f} | {s.edge_px:.2f} | {s.clean_edge:.1%} |"
        for name, s in scores.items()
    ]
    card = _TEXT.format(
        version=__version__,
        seed=seed,
        stages="\n".join(
            f"| {stage.name} | {stage.steps} of {stage.planned} | {stage.seconds:.0f} |" for stage in stages
        ),
        rmse=drawn_back.rmse,
        known=drawn_back.known,
        new=drawn_back.new,
        steps=STEPS,
        cfg=CFG,
        length=MAX_SEQUENCE_LENGTH,
        edge=CLEAN_EDGE_PX,
        scores="\n".join(rows),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


@dataclass(frozen=True)
class Kind:
    """What a card says of one of the other embedded models. command: the module that trains it."""

    title: str
    tag: str
    command: str
    what: str
    things: str = "pictures"


EDIT = Kind(
    "Nano, edit",
    "image-to-image",
    "whitetuner.nano.pretrain_edit",
    """The embedded FLUX.2 Klein (../model), its transformer trained on with a reference beside the picture: it changes a flat
shape's colour, its background's, or mirrors it, as it is told, and leaves the rest. Autoencoder, text encoder, tokenizer and
scheduler are those of ../model, from where White Tuner takes them. Pictures are drawn in {steps} steps without guidance.""",
)
ZIMAGE = Kind(
    "Nano, Z-Image",
    "text-to-image",
    "whitetuner.nano.pretrain_zimage",
    """A `ZImagePipeline` of the ordinary classes, made small, for the same pictures and captions as ../model. Its transformer
was trained from nothing; the autoencoder's weights are those of ../model, as an `AutoencoderKL`. Text encoder and tokenizer
are those of ../model, from where White Tuner takes them. Pictures are drawn in {steps} steps with guidance {cfg:g}.""",
)
WAN = Kind(
    "Nano, WAN",
    "image-to-video",
    "whitetuner.nano.pretrain_wan",
    """A 2.1 image-to-video WAN of the ordinary classes, made small (`WanImageToVideoPipeline`): five frames of 48x48 pixels. The
flat shape of the first frame moves as it is told: `it moves left` (right, up, down), `it stays`, `it grows`, `it shrinks`.
Autoencoder and transformer were trained from nothing, the rest is random: a UMT5, its tokenizer and a CLIP that tell words and
pictures apart. Clips are drawn in {steps} steps without guidance.""",
    "clips",
)
_SMALL = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: {tag}
---
# {title}

{what}

Trained on {things} that `whitetuner.nano` draws; nothing else went into it. Seed {seed}:

    python -m {command} --out DIR --steps {planned}

{earlier}{done} of {planned} steps in {seconds:.0f} seconds (wall time); mean loss of the last hundred {loss:.4f}.

| of {n} {things} | right |
|---|---|
{rows}
"""


def write_small_card(
    folder: Path,
    kind: Kind,
    seed: int,
    training: Training,
    loss: float,
    n: int,
    scores: dict[str, float],
    autoencoder: Training | None = None,
) -> None:
    """Writes folder/README.md, and prints the scores. scores: what was asked -> share that came out right.

    autoencoder: its training, where it has one of its own.
    """
    rows = "\n".join(f"| {name} | {share:.1%} |" for name, share in scores.items())
    card = _SMALL.format(
        tag=kind.tag,
        things=kind.things,
        title=kind.title,
        what=kind.what.format(steps=STEPS, cfg=CFG),
        command=kind.command,
        earlier=""
        if autoencoder is None
        else f"Autoencoder: {autoencoder.steps} steps in {autoencoder.seconds:.0f} seconds. Transformer: ",
        seed=seed,
        planned=training.planned,
        done=training.steps,
        seconds=training.seconds,
        loss=loss,
        n=n,
        rows=rows,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(rows, flush=True)
