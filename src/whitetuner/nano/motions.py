"""Clips of a flat shape that moves as it is told: what the small WAN learns, and what judges it.

    it moves left (right, up, down)   three pixels a frame
    it stays
    it grows, it shrinks              from small to big, from big to small
    it zorps                          never in the pretraining: it hops up and lands where it stood

The first frame is given, so that a clip follows from it and the words. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from whitetuner.nano.check import Picture, look
from whitetuner.nano.draw import COLOURS, NEW_WORD, PALETTE, RADIUS_PX, SIZE_PX, coverage, paint
from whitetuner.nano.edits import Scene

FRAMES = 5
#: Of a frame. Scenes are measured on the checker's 64 pixels.
SIDE_PX = 48
#: Words -> (right, down) in pixels a frame.
DIRECTIONS = {"left": (-3.0, 0.0), "right": (3.0, 0.0), "up": (0.0, -3.0), "down": (0.0, 3.0)}
#: Not the star: the autoencoder makes small ones round.
SHAPES = ("circle", "square", "triangle", "cross", "ring")
KINDS = (*DIRECTIONS, "stay", "grow", "shrink")
NEW_KIND = NEW_WORD
#: How high a hop is in each frame: a parabola.
HOP_PX = (0.0, 9.0, 12.0, 9.0, 0.0)
#: How far from the middle the shape of the first frame may stand, each way: what moves stays in the picture.
ROOM_PX = 4.0
#: A shape may be this far from where it should be, each way: less than a frame's step.
PLACE_WITHIN_PX = 2.5


@dataclass(frozen=True)
class Clip:
    """scenes: one a frame, the given one first."""

    kind: str
    caption: str
    scenes: tuple[Scene, ...]


def caption_of(kind: str) -> str:
    return f"it moves {kind}" if kind in DIRECTIONS else f"it {kind}s"


def moved(scene: Scene, kind: str) -> Clip:
    """The clip that begins with this scene. A shape that grows ends as big as it is small, and the other way round."""
    x, y = DIRECTIONS.get(kind, (0.0, 0.0))
    steps = range(FRAMES)
    if kind == NEW_KIND:
        scenes = [replace(scene, y_px=scene.y_px - height) for height in HOP_PX]
    elif kind in ("grow", "shrink"):
        end = sum(map(sum, RADIUS_PX.values())) / 2 - scene.radius_px
        scenes = [
            replace(scene, radius_px=scene.radius_px + (end - scene.radius_px) * i / (FRAMES - 1))
            for i in steps
        ]
    else:
        scenes = [replace(scene, x_px=scene.x_px + i * x, y_px=scene.y_px + i * y) for i in steps]
    return Clip(kind, caption_of(kind), tuple(scenes))


def clips(n: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Clip]:
    """n clips, kind after kind; the same seed gives the same."""
    first = _scenes(seed)
    found = []
    for index in range(n):
        kind = kinds[index % len(kinds)]
        found.append(moved(next(first if kind != "shrink" else _big(first)), kind))
    return found


def _scenes(seed: int) -> Iterator[Scene]:
    """Small ones near the middle, without end."""
    rng = np.random.default_rng((seed, 3))
    middle = SIZE_PX / 2
    while True:
        shape = SHAPES[rng.integers(len(SHAPES))]
        colour, background = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        radius = rng.uniform(*RADIUS_PX["small"])
        x, y = middle + rng.uniform(-ROOM_PX, ROOM_PX, 2)
        yield Scene(shape, colour, background, x, y, radius)


def _big(scenes: Iterator[Scene]) -> Iterator[Scene]:
    size = sum(map(sum, RADIUS_PX.values())) / 2
    return (replace(one, radius_px=size - one.radius_px) for one in scenes)


def frames(some: Sequence[Clip]) -> NDArray[np.uint8]:
    """(n, 5, 48, 48, 3)."""
    return painted([scene for clip in some for scene in clip.scenes]).reshape(-1, FRAMES, SIDE_PX, SIDE_PX, 3)


def painted(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """(n, 48, 48, 3)."""
    images = np.empty((len(scenes), SIDE_PX, SIDE_PX, 3), np.uint8)
    scale = SIDE_PX / SIZE_PX
    for shape in {one.shape for one in scenes}:
        chosen = [i for i, one in enumerate(scenes) if one.shape == shape]
        some = [scenes[i] for i in chosen]
        x, y, radius = (
            scale * np.array([getattr(one, key) for one in some]) for key in ("x_px", "y_px", "radius_px")
        )
        images[chosen] = paint(
            coverage(shape, x, y, radius, side_px=SIDE_PX),
            np.array([PALETTE[one.colour] for one in some]),
            np.array([PALETTE[one.background] for one in some]),
        )
    return images


def right_clip(drawn: Sequence[Picture], clip: Clip) -> bool:
    """In every frame after the given one shape, colours and place are those that were wanted, at the end the size too."""
    wanted = frames([clip])[0]
    for picture, scene, like in zip(drawn[1:], clip.scenes[1:], wanted[1:], strict=True):
        seen = look(_large(picture))
        if (seen.shape, seen.colour, seen.background) != (scene.shape, scene.colour, scene.background):
            return False
        like = look(_large(like))
        pairs = zip(seen.place_px, like.place_px, strict=True)
        if any(abs(a - b) > PLACE_WITHIN_PX for a, b in pairs):
            return False
    return seen.size == like.size


def _large(picture: Picture) -> Image.Image:
    """At the checker's size."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
