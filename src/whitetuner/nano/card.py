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
