"""Captioned pictures, drawn from a seed: one flat shape on a flat background, 64x64, anti-aliased.

They are what the embedded model was trained on, what it is taught in the demo, and (with their labels) what
the checker judges it against. Shapes are signed distance functions, so an edge is exactly one pixel wide at
any position and size.

Price of being learnable by a 1.6 M parameter model within minutes: shapes stay within 3 px of the middle and
come in two narrow ranges of radius (the words `small` and `big`). Continuous sizes and +-9 px took more than
three times as long.

numpy only, so that a test data set can be drawn without loading torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE_PX = 64
MARGIN_PX = 2.0
JITTER_PX = 3.0
RADIUS_PX = {"small": (12.0, 13.5), "big": (20.5, 22.0)}

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 80, 215),
    "yellow": (245, 210, 50),
    "purple": (140, 60, 180),
    "orange": (245, 135, 35),
    "white": (245, 245, 245),
    "black": (25, 25, 28),
}
COLOURS = tuple(PALETTE)
PALETTE_RGB: NDArray[np.float64] = np.array([PALETTE[colour] for colour in COLOURS], dtype=np.float64)

#: What the embedded model knows.
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
#: What it has never seen: the outline, and the word the demo teaches for it.
NEW_SHAPE = "heart"
NEW_WORD = "zorp"

PHRASINGS = (
    "a {size}{colour} {word} on a {background} background",
    "a {size}{colour} {word} on {background}",
    "{background} background with a {size}{colour} {word}",
)
SIZE_WORDS = ("", "small ", "big ")


@dataclass(frozen=True)
class Label:
    """What a picture shows. size is "small", "big", or None where the caption does not say."""

    shape: str
    colour: str
    background: str
    size: str | None = None


@dataclass(frozen=True)
class Drawing:
    """image: (64, 64, 3) uint8."""

    image: NDArray[np.uint8]
    caption: str
    label: Label


def unseen(shape: str, colour: str, background: str) -> bool:
    """True for the combinations kept out of pretraining (30 of 336), so that a score on them is not recall.

    Every shape, colour and background occurs among them as well as among the others.
    """
    if shape not in SHAPES:
        return False
    return (3 * SHAPES.index(shape) + 5 * COLOURS.index(colour) + 2 * COLOURS.index(background)) % 11 == 0


def caption_of(word: str, colour: str, background: str, size: str = "", phrasing: int = 0) -> str:
    """size: "", "small " or "big " (with its space); phrasing: 0, 1 or 2."""
    return PHRASINGS[phrasing].format(size=size, colour=colour, word=word, background=background)


def all_captions(shapes: Sequence[str] = SHAPES) -> Iterator[str]:
    """Every caption that `draw_set` can give for these shapes, combinations of `unseen` included (3024 for
    `SHAPES`).
    """
    for shape in shapes:
        for colour in COLOURS:
            for background in COLOURS:
                if background != colour:
                    for size in SIZE_WORDS:
                        for phrasing in range(len(PHRASINGS)):
                            yield caption_of(shape, colour, background, size, phrasing)


def draw_set(
    n: int,
    seed: int,
    shapes: Sequence[str] = SHAPES,
    word: str | None = None,
    held_out: bool | None = None,
) -> list[Drawing]:
    """n captioned pictures; the same n, seed and choices give the same bytes.

    shapes:   outlines to draw from, of `SHAPES` and "heart".
    word:     said in the captions in place of the outline's own name (to teach a new word).
    held_out: True draws only combinations of `unseen`, False only the others, None both.
    """
    rng = np.random.default_rng(seed)
    labels: list[Label] = []
    sizes: list[str] = []
    captions: list[str] = []
    while len(labels) < n:
        shape = shapes[int(rng.integers(len(shapes)))]
        foreground = int(rng.integers(len(COLOURS)))
        background = COLOURS[(foreground + 1 + rng.integers(len(COLOURS) - 1)) % len(COLOURS)]
        colour = COLOURS[foreground]
        size = ("small", "big")[rng.integers(2)]
        says_size = bool(rng.integers(2))
        phrasing = int(rng.integers(len(PHRASINGS)))
        if held_out is not None and unseen(shape, colour, background) != held_out:
            continue
        labels.append(Label(shape, colour, background, size if says_size else None))
        sizes.append(size)
        captions.append(
            caption_of(word or shape, colour, background, f"{size} " if says_size else "", phrasing)
        )
    low, high = np.array([RADIUS_PX[size] for size in sizes]).reshape(n, 2).T
    radius = rng.uniform(low, high)
    room = np.minimum(SIZE_PX / 2 - radius - MARGIN_PX, JITTER_PX)
    centre = SIZE_PX / 2 + rng.uniform(-1, 1, (2, n)) * room
    images = np.empty((n, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    for shape in set(shapes):
        chosen = [i for i, label in enumerate(labels) if label.shape == shape]
        if chosen:
            images[chosen] = paint(
                coverage(shape, centre[0, chosen], centre[1, chosen], radius[chosen]),
                np.array([PALETTE[labels[i].colour] for i in chosen]),
                np.array([PALETTE[labels[i].background] for i in chosen]),
            )
    return [Drawing(*drawn) for drawn in zip(images, captions, labels, strict=True)]


def paint(cover: NDArray, colour: NDArray, background: NDArray) -> NDArray[np.uint8]:
    """cover (n, h, w) in [0, 1], colours (n, 3) in 0..255 -> (n, h, w, 3) uint8."""
    cover = cover[..., None]
    blend = colour[:, None, None, :] * cover + background[:, None, None, :] * (1 - cover)
    return np.rint(blend).astype(np.uint8)


def coverage(
    shape: str, x_px: NDArray, y_px: NDArray, radius_px: NDArray, *, side_px: int = SIZE_PX
) -> NDArray:
    """How much of each pixel the shape covers. Arguments (n,) in pixels -> (n, side, side) in [0, 1]."""
    grid = np.arange(side_px) + 0.5
    x = (grid[None, None, :] - x_px[:, None, None]) / radius_px[:, None, None]
    y = (grid[None, :, None] - y_px[:, None, None]) / radius_px[:, None, None]
    x, y = np.broadcast_arrays(x, y)
    return np.clip(0.5 - signed_distance(shape, x, y) * radius_px[:, None, None], 0, 1)


def signed_distance(shape: str, x: NDArray, y: NDArray) -> NDArray:
    """Distance to the outline in units of the radius, negative inside; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26
    return _polygon_distance(OUTLINES[shape], x, y)


def _polygon_distance(corners: Sequence[tuple[float, float]], x: NDArray, y: NDArray) -> NDArray:
    """Nearest edge gives the distance, the parity of crossed edges the sign."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        spans = (ay <= y) != (by <= y)
        if ey:
            inside ^= spans & (wx < ex / ey * wy)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _star() -> list[tuple[float, float]]:
    radii = (1.08, 0.45)
    return [
        (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5))
        for i in range(10)
    ]


def _heart() -> list[tuple[float, float]]:
    """The well-known curve x = 16 sin^3 t (mathworld.wolfram.com/HeartCurve.html), centred, as a polygon of
    32 corners.
    """
    corners = []
    for i in range(32):
        t = i * math.pi / 16
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append((16 * math.sin(t) ** 3 / 17, -(y + 2.5) / 16))
    return corners


_ARM = 0.33
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "cross": [
        (-_ARM, -1),
        (_ARM, -1),
        (_ARM, -_ARM),
        (1, -_ARM),
        (1, _ARM),
        (_ARM, _ARM),
        (_ARM, 1),
        (-_ARM, 1),
        (-_ARM, _ARM),
        (-1, _ARM),
        (-1, -_ARM),
        (-_ARM, -_ARM),
    ],
    "star": _star(),
    "heart": _heart(),
}
