"""Sizes that pictures are trained at: sides are multiples of the model's stride, the area is about the wanted resolution
squared, the shape is the one that crops the picture least. A picture is never stretched, and never enlarged unless asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from whitetuner.errors import UserError
from whitetuner.records import Size

#: Longest side of a bucket over its shortest: beyond it pictures lose their ends.
LONGEST_SHAPE = 4.0


@dataclass(frozen=True)
class Bucketing:
    """resolutions: sides of the squares whose areas are aimed at, in pixels; stride_px: all sides are multiples of it;
    min_size_px: no side gets shorter (half the resolution where that is less); upscale: small pictures may be enlarged.
    """

    resolutions: tuple[int, ...]
    stride_px: int
    min_size_px: int = 64
    upscale: bool = False

    @property
    def shortest_px(self) -> int:
        """Shortest side of any bucket."""
        wanted = min(self.min_size_px, min(self.resolutions) // 2)
        return max(self.stride_px, -(-wanted // self.stride_px) * self.stride_px)


def bucketing(
    resolution: int | list[int] | tuple[int, ...],
    stride_px: int,
    min_size_px: int = 64,
    upscale: bool = False,
) -> Bucketing:
    """The rules of one set. Raises UserError for a resolution that is no multiple of the stride, with the nearest ones."""
    resolutions = (resolution,) if isinstance(resolution, int) else tuple(resolution)
    if not resolutions:
        raise UserError(
            "no resolution is given", where="data.resolution", mend="set one, as resolution = 1024"
        )
    for one in resolutions:
        if one < stride_px or one % stride_px:
            below = one // stride_px * stride_px
            raise UserError(
                "resolution {resolution} is not a multiple of {stride}, as this model needs",
                where="data.resolution",
                mend="use {nearest}",
                resolution=one,
                stride=stride_px,
                nearest=f"{below} or {below + stride_px}" if below else stride_px,
            )
    return Bucketing(tuple(sorted(set(resolutions))), stride_px, min_size_px, upscale)


@lru_cache(maxsize=65536)
def choose(source: Size, rules: Bucketing) -> Size | None:
    """The size a picture is trained at, or None when it is too small for any.

    The largest resolution whose bucket needs no enlarging; else, with `upscale`, the smallest resolution's bucket; else a
    bucket of the picture's own: its sides rounded down to the stride.
    """
    for resolution in sorted(rules.resolutions, reverse=True):
        size = least_crop(source, shapes(resolution, rules.stride_px, rules.shortest_px))
        if covers(source, size):
            return size
    smallest = min(rules.resolutions)
    if rules.upscale:
        return least_crop(source, shapes(smallest, rules.stride_px, rules.shortest_px))
    return _own(source, smallest, rules)


@lru_cache(maxsize=256)
def shapes(resolution: int, stride_px: int, shortest_px: int) -> tuple[Size, ...]:
    """All buckets of one resolution, widest last: for each width the greatest height with an area of at most resolution
    squared, and the same turned by 90 degrees.
    """
    area = resolution * resolution
    found = set()
    for width in range(shortest_px, area // shortest_px + 1, stride_px):
        height = area // width // stride_px * stride_px
        if height >= shortest_px and max(width, height) <= LONGEST_SHAPE * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(Size(width, height) for width, height in sorted(found))


def least_crop(source: Size, sizes: tuple[Size, ...]) -> Size:
    """The size that keeps most of the picture; of equals the one with more pixels."""
    return min(sizes, key=lambda size: (round(cropped(source, size), 9), -size.width * size.height, size))


def cropped(source: Size, size: Size) -> float:
    """Share of the picture's area that is cut away when it is brought to a size, 0..1."""
    across, down = size.width * source.height, size.height * source.width
    return 1.0 - min(across, down) / max(across, down)


def covers(source: Size, size: Size) -> bool:
    """Whether a picture fills a size without being enlarged."""
    return source.width >= size.width and source.height >= size.height


def fit(source: Size, resolution: int, stride_px: int, upscale: bool = False) -> Size | None:
    """The size a given picture is read at: its own shape, scaled to an area of at most resolution squared, each side rounded
    down to the stride (so that less than a stride is cut off). Not enlarged unless asked. None: a side is below the stride.
    """
    scale = resolution / math.sqrt(source.width * source.height)
    if scale > 1 and not upscale:
        scale = 1.0
    # the small number: 96 * (64 / 96) is a little less than 64
    width, height = (
        int(side * scale + 1e-6) // stride_px * stride_px for side in (source.width, source.height)
    )
    return Size(width, height) if width and height else None


def _own(source: Size, resolution: int, rules: Bucketing) -> Size | None:
    stride, shortest = rules.stride_px, rules.shortest_px
    width, height = source.width // stride * stride, source.height // stride * stride
    if min(width, height) < shortest:
        return None
    longest = int(LONGEST_SHAPE * min(width, height)) // stride * stride
    width, height = min(width, longest), min(height, longest)
    while (
        width * height > resolution * resolution
    ):  # the rounded-down sides can hold a little more than the bucket did
        if width >= height:
            width -= stride
        else:
            height -= stride
    return Size(width, height)
