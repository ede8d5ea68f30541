"""How often does a pipeline draw what its captions say?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from whitetuner.nano.builtin import CFG, MAX_SEQUENCE_LENGTH, STEPS, builtin_path
from whitetuner.nano.check import CLEAN_EDGE_PX, Picture, judge, look
from whitetuner.nano.draw import SHAPES, SIZE_PX, Label, draw_set

if TYPE_CHECKING:
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
    from PIL.Image import Image

#: Between the noise seeds of two pictures of one call; a prime far above any number of pictures.
_SEED_STRIDE = 1_000_003


def generators(seed: int, chosen: Iterable[int]) -> list[torch.Generator]:
    """The noise of each picture: a function of (seed, its number), whatever the batch size."""
    return [torch.Generator().manual_seed(seed * _SEED_STRIDE + i) for i in chosen]


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1] of n pictures. all: shape, colour and background right at once.

    fit:        mean overlap in [0, 1] with the nearest ideal outline (`check`: a drawing has at least .96):
                how straight the edges run.
    edge_px:    mean width of the edges in pixels (`check`: a drawing has about 1): how sharp they are.
    clean_edge: share whose edge is at most `check.CLEAN_EDGE_PX` wide. All three over pictures with a shape.
    """

    all: float
    shape: float
    colour: float
    background: float
    fit: float
    edge_px: float
    clean_edge: float
    n: int


def score(images: Sequence[Picture], labels: Sequence[Label]) -> Score:
    """Judges picture i by label i. images: PIL or (64, 64, 3) arrays in 0..255. Raises ValueError if there
    are none.
    """
    if not images:
        raise ValueError("there is nothing to score")
    verdicts = [judge(image, label) for image, label in zip(images, labels, strict=True)]
    shapes = [seen for seen in map(look, images) if seen.edge_px > 0]
    return Score(
        all=fmean(verdict.all for verdict in verdicts),
        shape=fmean(verdict.shape for verdict in verdicts),
        colour=fmean(verdict.colour for verdict in verdicts),
        background=fmean(verdict.background for verdict in verdicts),
        fit=fmean(seen.fit for seen in shapes) if shapes else 0.0,
        edge_px=fmean(seen.edge_px for seen in shapes) if shapes else 0.0,
        clean_edge=fmean(seen.edge_px <= CLEAN_EDGE_PX for seen in shapes) if shapes else 0.0,
        n=len(images),
    )


def evaluation_prompts(
    n: int,
    seed: int,
    shapes: Sequence[str] = SHAPES,
    word: str | None = None,
    held_out: bool | None = None,
) -> tuple[list[str], list[Label]]:
    """Captions and what they say, chosen like `draw.draw_set` chooses them; held_out as there."""
    drawings = draw_set(n, seed, shapes, word, held_out)
    return [drawing.caption for drawing in drawings], [drawing.label for drawing in drawings]


def load_pipeline(
    path: Path | None = None,
    transformer: Flux2Transformer2DModel | None = None,
    dtype: torch.dtype = torch.float32,
) -> Flux2KleinPipeline:
    """The embedded pipeline (or the one at path), silent, on the CPU; with another transformer if one is
    given.
    """
    from diffusers import Flux2KleinPipeline

    parts = {} if transformer is None else {"transformer": transformer}
    pipeline = Flux2KleinPipeline.from_pretrained(path or builtin_path(), torch_dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw_with(
    pipeline: Flux2KleinPipeline,
    captions: Sequence[str],
    seed: int,
    steps: int = STEPS,
    cfg: float = CFG,
    batch: int = 32,
) -> list[Image]:
    """One 64x64 picture a caption. The noise of picture i is a function of (seed, i), whatever the batch
    size.
    """
    images: list[Image] = []
    for start in range(0, len(captions), batch):
        chosen = range(start, min(start + batch, len(captions)))
        noise = generators(seed, chosen)
        images += pipeline(
            prompt=[captions[i] for i in chosen],
            height=SIZE_PX,
            width=SIZE_PX,
            num_inference_steps=steps,
            guidance_scale=cfg,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=noise,
        ).images
    return images
