"""What the embedded model is taught in the laboratory: concepts it has never seen, each with a drawer and a judge.

    zorp  an outline: the demo's heart
    duo   a texture: a disc whose left half has the named colour and whose right half is white
    nook  a layout: a disc in the upper left quarter, where the model has never drawn anything

Judges learn nothing; they are those of nano/check.py, and for what that does not know a few lines more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from whitetuner.nano import check
from whitetuner.nano.draw import (
    COLOURS,
    NEW_SHAPE,
    NEW_WORD,
    PALETTE,
    PALETTE_RGB,
    SIZE_PX,
    Drawing,
    Label,
    coverage,
    draw_set,
    paint,
)

#: Of each half of a `duo` at least this share must have the half's colour.
LEAST_PURE = 0.75
MASK_MARGIN_PX = 4
#: A `nook` lies around (20, 20) px; what the model knows lies within 3 px of (32, 32).
NOOK_PX, NOOK_WITHIN_PX = 20.0, 26.0


@dataclass(frozen=True)
class Concept:
    """draw: (count, seed) -> captioned pictures; right: whether a picture shows what the label says."""

    word: str
    what: str
    draw: Callable[[int, int], list[Drawing]]
    right: Callable[[check.Picture, Label], bool]


def save(drawings: list[Drawing], folder: Path) -> None:
    """Pictures and captions as a user would have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, drawing in enumerate(drawings):
        Image.fromarray(drawing.image).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(drawing.caption, encoding="utf-8")


def tags_of(drawing: Drawing) -> list[str]:
    """["zorp", "red", "white background"], and the size where the caption says one."""
    words, label = drawing.caption.split(), drawing.label
    (word,) = {*words} & {*CONCEPTS}
    return [word, label.colour, f"{label.background} background", *filter(None, [label.size])]


def shuffled_tags(drawings: list[Drawing], seed: int) -> list[str]:
    """Captions of tags: the word first, the rest in an order of lot."""
    rng = np.random.default_rng(seed)
    return [", ".join([one[0], *rng.permutation(one[1:])]) for one in map(tags_of, drawings)]


def mask_of(image: NDArray[np.uint8]) -> Image.Image:
    """White: the shape and MASK_MARGIN_PX around it."""
    pixels = image.astype(float)
    away = np.linalg.norm(pixels - np.median(check._border(pixels), axis=0), axis=-1) > check.DIFFERENT
    return Image.fromarray((check._filter(away, MASK_MARGIN_PX, np.max) * 255).astype(np.uint8))


def known_right(picture: check.Picture, label: Label) -> bool:
    """Shape, colour and background are those of the label."""
    return check.judge(picture, label).all


def draw_zorp(count: int, seed: int) -> list[Drawing]:
    return draw_set(count, seed, (NEW_SHAPE,), NEW_WORD)


def draw_duo(count: int, seed: int) -> list[Drawing]:
    """Discs, their right half painted over; nothing else in them is white."""
    found = []
    for drawing in draw_set(3 * count + 16, seed, ("circle",), "duo"):
        label = drawing.label
        if "white" in (label.colour, label.background):
            continue
        ground, colour, white = (
            np.array(PALETTE[name], float) for name in (label.background, label.colour, "white")
        )
        axis = colour - ground
        cover = np.clip((drawing.image - ground) @ axis / (axis @ axis), 0, 1)
        x = np.arange(SIZE_PX) + 0.5
        middle = float(cover.sum(0) @ x) / float(cover.sum())
        right = np.clip(x - middle + 0.5, 0, 1)[None, :, None]
        ink = white * right + colour * (1 - right)
        image = np.rint(ink * cover[..., None] + ground * (1 - cover[..., None])).astype(np.uint8)
        found.append(Drawing(image, drawing.caption, label))
    return found[:count]


def duo_right(picture: check.Picture, label: Label) -> bool:
    pixels, away = _away(picture)
    if away.sum() < check.FEWEST_PIXELS or check.colour_name(pixels[0, 0]) != label.background:
        return False
    shape, fit, _ = check._best_outline(away.astype(float))
    if shape != "circle" or fit < check.LEAST_FIT:
        return False
    inner = check._filter(away, 1, np.min)
    x = np.broadcast_to(np.arange(SIZE_PX) + 0.5, away.shape)
    middle = x[away].mean()
    halves = ((inner & (x < middle - 2), label.colour), (inner & (x > middle + 2), "white"))
    return all(half.any() and _share(pixels[half], colour) >= LEAST_PURE for half, colour in halves)


def draw_nook(count: int, seed: int) -> list[Drawing]:
    """Small discs far from the middle; captions say no size."""
    rng = np.random.default_rng(seed)
    plain = draw_set(count, seed, ("circle",), "nook")
    x, y = NOOK_PX + rng.uniform(-1.5, 1.5, (2, count))
    images = paint(
        coverage("circle", x, y, rng.uniform(11.0, 12.5, count)),
        np.array([PALETTE[one.label.colour] for one in plain]),
        np.array([PALETTE[one.label.background] for one in plain]),
    )
    return [
        Drawing(
            image,
            one.caption.replace("small ", "").replace("big ", ""),
            Label("circle", one.label.colour, one.label.background),
        )
        for image, one in zip(images, plain, strict=True)
    ]


def nook_right(picture: check.Picture, label: Label) -> bool:
    _, away = _away(picture)
    rows, columns = np.nonzero(away)
    placed = len(rows) > 0 and max(rows.mean(), columns.mean()) + 0.5 < NOOK_WITHIN_PX
    return bool(placed) and known_right(picture, label)


CONCEPTS = {
    one.word: one
    for one in (
        Concept(NEW_WORD, "an outline: a heart", draw_zorp, known_right),
        Concept("duo", "a texture: a disc, left half coloured, right half white", draw_duo, duo_right),
        Concept("nook", "a layout: a disc in the upper left quarter", draw_nook, nook_right),
    )
}


def _away(picture: check.Picture) -> tuple[NDArray, NDArray]:
    """(pixels whose corner is the background's median, which of them differ from the background)."""
    pixels = np.array(picture, dtype=np.float64)
    ground = np.median(check._border(pixels), axis=0)
    away = np.linalg.norm(pixels - ground, axis=-1) > check.DIFFERENT
    pixels[0, 0] = ground
    return pixels, away


def _share(pixels: NDArray, colour: str) -> float:
    """Of pixels (n, 3), how many are nearest to this palette colour."""
    distances = np.linalg.norm(pixels[:, None, :] - PALETTE_RGB[None], axis=-1)
    return float((distances.argmin(1) == COLOURS.index(colour)).mean())
