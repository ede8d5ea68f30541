"""Pairs of pictures and what was done between them: what the small edit model learns, and what judges it.

    make it red               the shape's colour; shape, place and background stay
    make the background red   the other way round
    mirror it                 left is right; shapes are symmetric, so those that are mirrored stand to one side
    swap it                   never in the pretraining: shape and background exchange their colours
    zorp it                   nor this: the shape becomes a heart, colours and place stay

numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from whitetuner.nano.check import Picture, judge, look
from whitetuner.nano.draw import (
    COLOURS,
    JITTER_PX,
    MARGIN_PX,
    NEW_SHAPE,
    NEW_WORD,
    PALETTE,
    RADIUS_PX,
    SHAPES,
    SIZE_PX,
    Label,
    coverage,
    paint,
)

#: What the small edit model knows; the new ones are what it can be taught.
KINDS = ("colour", "background", "mirror")
NEW_KIND = NEW_WORD
NEW_KINDS = (NEW_KIND, "swap")
#: How far from the middle a shape stands that can be mirrored.
ASIDE_PX = (7.0, 14.0)
#: An edited shape may be this far from where it should be, each way.
PLACE_WITHIN_PX = 3.0


@dataclass(frozen=True)
class Scene:
    shape: str
    colour: str
    background: str
    x_px: float
    y_px: float
    radius_px: float

    @property
    def label(self) -> Label:
        return Label(self.shape, self.colour, self.background)


@dataclass(frozen=True)
class Edit:
    kind: str
    instruction: str
    given: Scene
    wanted: Scene


def pictures(scenes: list[Scene]) -> NDArray[np.uint8]:
    """(n, 64, 64, 3)."""
    images = np.empty((len(scenes), SIZE_PX, SIZE_PX, 3), np.uint8)
    for shape in {one.shape for one in scenes}:
        chosen = [i for i, one in enumerate(scenes) if one.shape == shape]
        some = [scenes[i] for i in chosen]
        images[chosen] = paint(
            coverage(
                shape,
                *(np.array([getattr(one, key) for one in some]) for key in ("x_px", "y_px", "radius_px")),
            ),
            np.array([PALETTE[one.colour] for one in some]),
            np.array([PALETTE[one.background] for one in some]),
        )
    return images


def scenes(seed: int) -> Iterator[Scene]:
    """Without end; the same seed gives the same. Half of them small and aside, half big and in the middle."""
    rng = np.random.default_rng(seed)
    while True:
        shape = SHAPES[rng.integers(len(SHAPES))]
        colour, background = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        small = bool(rng.integers(2))
        radius = rng.uniform(*RADIUS_PX["small" if small else "big"])
        room = min(SIZE_PX / 2 - radius - MARGIN_PX, JITTER_PX)
        aside = rng.uniform(*ASIDE_PX) * rng.choice((-1, 1)) if small else rng.uniform(-room, room)
        middle = SIZE_PX / 2
        yield Scene(shape, colour, background, middle + aside, middle + rng.uniform(-room, room), radius)


def edited(scene: Scene, kind: str, rng: np.random.Generator) -> Edit:
    """One edit of this kind; which colour is taken is chosen by rng."""
    free = [one for one in COLOURS if one not in (scene.colour, scene.background)]
    colour = free[rng.integers(len(free))]
    if kind == "colour":
        return Edit(kind, f"make it {colour}", scene, replace(scene, colour=colour))
    if kind == "background":
        return Edit(kind, f"make the background {colour}", scene, replace(scene, background=colour))
    if kind == "mirror":
        return Edit(kind, "mirror it", scene, replace(scene, x_px=SIZE_PX - scene.x_px))
    if kind == "swap":
        wanted = replace(scene, colour=scene.background, background=scene.colour)
        return Edit(kind, "swap it", scene, wanted)
    return Edit(kind, f"{NEW_WORD} it", scene, replace(scene, shape=NEW_SHAPE))


def edits(n: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[Edit]:
    """n edits, kind after kind; only what stands aside is mirrored."""
    rng = np.random.default_rng((seed, 1))
    found: list[Edit] = []
    for scene in scenes(seed):
        if len(found) == n:
            break
        kind = kinds[len(found) % len(kinds)]
        if kind != "mirror" or abs(scene.x_px - SIZE_PX / 2) >= ASIDE_PX[0]:
            found.append(edited(scene, kind, rng))
    return found


def instructions() -> list[str]:
    """Every one that `edits` gives for `KINDS`."""
    return [
        "mirror it",
        *(f"make {what} {colour}" for what in ("it", "the background") for colour in COLOURS),
    ]


def right(picture: Picture, edit: Edit) -> bool:
    """Shape, colours and place are those of the picture that was wanted."""
    if not judge(picture, edit.wanted.label).all:
        return False
    place, wanted = look(picture).place_px, look(pictures([edit.wanted])[0]).place_px
    return all(abs(a - b) <= PLACE_WITHIN_PX for a, b in zip(place, wanted, strict=True))
