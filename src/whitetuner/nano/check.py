"""What does this picture show? A deterministic answer: shape, colour, background, size, edge.

Nothing is learned, so the judge cannot share a weakness with the model it judges:

* background: the median of a 2 px border, named by the nearest palette colour;
* colour: the median of what differs from it, named likewise;
* coverage: each pixel's place on the line from background to colour, which forgives softness;
* shape: every known outline is drawn with the coverage's area and centroid; the best overlap (soft
  intersection over union) names the shape, if it is good enough. Fitting a bounding box instead let single
  stray pixels decide.
* edge: the width of the transition in pixels. With a(x) the coverage, the length of the outline is the
  integral of |grad a| (coarea formula, whatever the blur), and a linear ramp of width w adds 2/3 w per unit
  of length to the integral of 4a(1-a).

One flat shape on one flat background is assumed; anything else is answered with "?".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from whitetuner.nano.draw import COLOURS, NEW_SHAPE, PALETTE_RGB, RADIUS_PX, SHAPES, SIZE_PX, Label, coverage

Picture: TypeAlias = Image | NDArray

UNKNOWN = "?"
#: Distance in RGB (0..255) up to which a colour takes a palette name; the two nearest, red and orange, lie 98
#: apart.
COLOUR_TOLERANCE = 70.0
#: A pixel differs from the background beyond this distance in RGB.
DIFFERENT = 60.0
FEWEST_PIXELS = 40
#: Least overlap with the best outline. Clean drawings reach .97; the best wrong outline stays under .9 of the
#: right one.
LEAST_FIT = 0.72
SIZE_BORDER_PX = (RADIUS_PX["small"][1] + RADIUS_PX["big"][0]) / 2 - 0.2
#: A drawing straight from `draw` measures 1.0 to 1.2 px; beyond this an edge looks soft at a glance.
CLEAN_EDGE_PX = 2.0


@dataclass(frozen=True)
class Seen:
    """What a picture shows. Names are "?" where nothing fits; fit in [0, 1]; edge_px is 0 where there is no
    shape. place_px: (x, y) of the shape's centroid.
    """

    shape: str = UNKNOWN
    colour: str = UNKNOWN
    background: str = UNKNOWN
    size: str = UNKNOWN
    fit: float = 0.0
    edge_px: float = 0.0
    place_px: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Verdict:
    """Which of the things that a label asks for the picture shows."""

    shape: bool
    colour: bool
    background: bool
    size: bool

    @property
    def all(self) -> bool:
        """Shape, colour and background. Size is told beside, not counted: it is a matter of degree."""
        return self.shape and self.colour and self.background


def judge(image: Picture, label: Label) -> Verdict:
    """image: (64, 64, 3), 0..255, or a PIL picture of that size."""
    seen = look(image)
    return Verdict(
        shape=seen.shape == label.shape,
        colour=seen.colour == label.colour,
        background=seen.background == label.background,
        size=label.size is None or seen.size == label.size,
    )


def look(image: Picture) -> Seen:
    """image: (64, 64, 3), 0..255, or a PIL picture of that size. Raises ValueError for another size."""
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.shape != (SIZE_PX, SIZE_PX, 3):
        raise ValueError(
            f"expected a picture of {SIZE_PX} x {SIZE_PX} RGB pixels, got an array of shape {pixels.shape}"
        )
    ground = np.median(_border(pixels), axis=0)
    away = np.linalg.norm(pixels - ground, axis=-1) > DIFFERENT
    if away.sum() < FEWEST_PIXELS:
        return Seen(background=colour_name(ground))
    inner = _filter(away, 1, np.min)
    ink = np.median(pixels[inner if inner.sum() >= 12 else away], axis=0)
    axis = ink - ground
    raw = np.clip((pixels - ground) @ axis / max(axis @ axis, 1.0), 0, 1)
    cover = _without_specks(np.clip((raw - 0.15) / 0.7, 0, 1))
    shape, fit, radius_px = _best_outline(cover)
    place_px = _area_and_centroid(cover)[1:] if cover.any() else (0.0, 0.0)
    return Seen(
        shape=shape if fit >= LEAST_FIT else UNKNOWN,
        colour=colour_name(ink),
        background=colour_name(ground),
        size="small" if radius_px < SIZE_BORDER_PX else "big",
        fit=fit,
        edge_px=_edge_width_px(_without_specks(raw)),
        place_px=place_px,
    )


def colour_name(rgb: NDArray) -> str:
    """rgb (3,), 0..255 -> the nearest palette colour, or "?"."""
    distances = np.linalg.norm(PALETTE_RGB - rgb, axis=1)
    nearest = int(distances.argmin())
    return COLOURS[nearest] if distances[nearest] < COLOUR_TOLERANCE else UNKNOWN


def _border(pixels: NDArray) -> NDArray:
    return np.concatenate(
        [side.reshape(-1, 3) for side in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])]
    )


def _filter(values: NDArray, reach: int, reduce: Callable) -> NDArray:
    """reduce over each (2 reach + 1)^2 neighbourhood; the border repeats itself."""
    padded = np.pad(values, reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    return reduce(windows, axis=(-2, -1))


def _without_specks(cover: NDArray) -> NDArray:
    """Keeps what lies within 2 px of a mostly covered 3x3 neighbourhood."""
    solid = _filter(cover, 1, np.mean) > 0.5
    return cover * _filter(solid, 2, np.max)


def _edge_width_px(cover: NDArray) -> float:
    down, right = np.gradient(cover)
    length_px = np.hypot(down, right).sum()
    return float(1.5 * (4 * cover * (1 - cover)).sum() / length_px) if length_px else 0.0


@cache
def _moments() -> dict[str, tuple[float, float, float]]:
    """Outline -> (area / radius^2, centroid x / radius, centroid y / radius)."""
    radius = np.array([22.0])
    middle = np.array([SIZE_PX / 2])
    found = {}
    for shape in (*SHAPES, NEW_SHAPE):
        area, x, y = _area_and_centroid(coverage(shape, middle, middle, radius)[0])
        found[shape] = (area / 22.0**2, (x - SIZE_PX / 2) / 22.0, (y - SIZE_PX / 2) / 22.0)
    return found


def _area_and_centroid(cover: NDArray) -> tuple[float, float, float]:
    grid = np.arange(SIZE_PX) + 0.5
    area = float(cover.sum())
    return area, float(cover.sum(0) @ grid) / area, float(cover.sum(1) @ grid) / area


def _best_outline(cover: NDArray) -> tuple[str, float, float]:
    """-> (shape, overlap in [0, 1], radius in pixels)."""
    if not cover.any():
        return UNKNOWN, 0.0, 0.0
    area, x, y = _area_and_centroid(cover)
    best = (UNKNOWN, 0.0, 0.0)
    for shape, (unit_area, dx, dy) in _moments().items():
        radius = np.array([np.sqrt(area / unit_area)])
        drawn = coverage(shape, x - radius * dx, y - radius * dy, radius)[0]
        overlap = float(np.minimum(cover, drawn).sum() / np.maximum(cover, drawn).sum())
        if overlap > best[1]:
            best = (shape, overlap, float(radius[0]))
    return best
