"""Simple landscapes with one thing in them, drawn from a seed: stand-ins for photographs in test data."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

#: Drawn at this multiple and scaled down, so that edges are smooth.
_FINER = 2

SKIES = {
    "at noon": ((88, 150, 226), (206, 226, 244)),
    "at sunset": ((58, 52, 110), (248, 158, 92)),
    "at night": ((8, 12, 34), (44, 54, 96)),
    "in fog": ((172, 178, 186), (214, 216, 218)),
}
LANDS = {
    "green hills": ((70, 128, 62), (36, 84, 42)),
    "a desert": ((214, 172, 110), (168, 118, 70)),
    "a snow field": ((236, 240, 246), (190, 202, 220)),
    "red rocks": ((158, 86, 62), (96, 46, 38)),
}
THINGS = {
    "red ball": (206, 44, 38),
    "blue house": (52, 84, 190),
    "yellow tent": (236, 190, 46),
    "white tower": (232, 230, 222),
}


@dataclass(frozen=True)
class Scene:
    """sky, land, thing: keys of the tables above; x: place of the thing, 0..1; seed: of hills and grain."""

    sky: str
    land: str
    thing: str
    x: float
    seed: int

    @property
    def caption(self) -> str:
        return f"a {self.thing} on {self.land} {self.sky}"


def scenes(count: int, seed: int) -> list[Scene]:
    """Different scenes, the same for a seed everywhere."""
    source = random.Random(seed)
    things, lands, skies = list(THINGS), list(LANDS), list(SKIES)
    return [
        Scene(
            sky=skies[
                int(source.random() * len(skies))
            ],  # random() is the same in every Python, choice() need not be
            land=lands[(seed + number + number // len(things)) % len(lands)],
            thing=things[number % len(things)],
            x=0.2 + 0.6 * source.random(),
            seed=seed * 1000 + number,
        )
        for number in range(count)
    ]


def paint(scene: Scene, width: int, height: int, *, thing: bool = True, grain: float = 4.0) -> Image.Image:
    """The scene as an RGB picture. thing: without it the place is empty; grain: deviation of sensor noise, 0..255."""
    wide, high = width * _FINER, height * _FINER
    sky = _blend(*SKIES[scene.sky], wide, high)
    land = _blend(*LANDS[scene.land], wide, high)
    line = Image.new("L", (wide, high), 0)
    ImageDraw.Draw(line).polygon([*_horizon(scene, wide, high), (wide, high), (0, high)], fill=255)
    image = Image.composite(land, sky, line)
    if thing:
        _stand(image, scene)
    small = image.resize((width, height), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.4))
    if grain == 0:
        return small
    noise = np.random.RandomState(scene.seed % 2**32).normal(0, grain, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).round().astype(np.uint8), "RGB")


def portrait_of(scene: Scene, side: int, close: bool = False) -> Image.Image:
    """The thing alone on white, as a reference picture; close: so near that it fills the picture."""
    image = Image.new("RGB", (side * _FINER, side * _FINER), "white")
    extent = image.width * (0.33 if close else 0.25)
    _thing(image, scene.thing, image.width / 2, image.height * (0.92 if close else 0.8), extent)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _blend(top: tuple[int, int, int], bottom: tuple[int, int, int], width: int, height: int) -> Image.Image:
    share = np.linspace(0, 1, height)[:, None, None]
    rows = (1 - share) * np.array(top) + share * np.array(bottom)
    return Image.fromarray(rows.round().astype(np.uint8).repeat(width, 1), "RGB")


def _horizon(scene: Scene, width: int, height: int) -> list[tuple[float, float]]:
    source = random.Random(scene.seed)
    waves = [(source.random() * 6.3, 1 + 2 * number, 0.05 / (1 + number)) for number in range(3)]
    across = np.linspace(0, 1, 65)
    heights = np.full(65, 0.6)
    for phase, count, size in waves:
        heights += size * np.sin(phase + 6.3 * count * across / 2)
    return [(float(x) * width, float(y) * height) for x, y in zip(across, heights, strict=True)]


def _stand(image: Image.Image, scene: Scene) -> None:
    extent = 0.13 * min(image.size)
    foot = 0.78 * image.height
    shade = Image.new("L", image.size, 0)
    across = scene.x * image.width
    ImageDraw.Draw(shade).ellipse(
        (across - extent, foot - extent / 5, across + 1.6 * extent, foot + extent / 5), fill=110
    )
    shade = shade.filter(ImageFilter.GaussianBlur(extent / 12))
    image.paste(Image.new("RGB", image.size, (10, 14, 20)), mask=shade)
    _thing(image, scene.thing, across, foot, extent)


def _thing(image: Image.Image, name: str, across: float, foot: float, extent: float) -> None:
    """Drawn standing with its middle at `across` and its foot at `foot`; extent: half its width, in pixels."""
    pen = ImageDraw.Draw(image)
    colour = THINGS[name]
    dark = tuple(value * 6 // 10 for value in colour)
    left, right = across - extent, across + extent
    if name == "red ball":
        pen.ellipse((left, foot - 2 * extent, right, foot), fill=colour)
        pen.ellipse(
            (across - 0.55 * extent, foot - 1.7 * extent, across - 0.1 * extent, foot - 1.25 * extent),
            fill=(240, 150, 140),
        )
    elif name == "blue house":
        pen.rectangle((left, foot - 1.1 * extent, right, foot), fill=colour)
        pen.polygon(
            [
                (left - 0.2 * extent, foot - 1.1 * extent),
                (across, foot - 2.1 * extent),
                (right + 0.2 * extent, foot - 1.1 * extent),
            ],
            fill=(120, 60, 44),
        )
        pen.rectangle((across - 0.2 * extent, foot - 0.6 * extent, across + 0.2 * extent, foot), fill=dark)
    elif name == "yellow tent":
        pen.polygon([(left, foot), (across, foot - 1.7 * extent), (right, foot)], fill=colour)
        pen.polygon(
            [(across - 0.3 * extent, foot), (across, foot - 1.1 * extent), (across + 0.3 * extent, foot)],
            fill=dark,
        )
    else:
        pen.rectangle((across - 0.4 * extent, foot - 2.4 * extent, across + 0.4 * extent, foot), fill=colour)
        pen.rectangle(
            (across - 0.55 * extent, foot - 2.7 * extent, across + 0.55 * extent, foot - 2.3 * extent),
            fill=dark,
        )
