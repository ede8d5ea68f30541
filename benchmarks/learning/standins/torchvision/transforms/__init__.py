"""What diffusers' Klein script and the peers take from torchvision.transforms, by torchvision's documentation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn.functional import interpolate


class InterpolationMode(Enum):
    BILINEAR = Resampling.BILINEAR


class RandomCrop:
    @staticmethod
    def get_params(image: Image, output_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a random cut of this (height, width)."""
        height, width = output_size
        return (
            random.randint(0, image.height - height),
            random.randint(0, image.width - width),
            height,
            width,
        )


class Resize:
    """Of a tensor (..., channels, height, width)."""

    def __init__(
        self,
        size: Sequence[int],
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
        antialias: bool = True,
    ) -> None:
        self.size, self.antialias = tuple(size), antialias

    def __call__(self, picture: Tensor) -> Tensor:
        if tuple(picture.shape[-2:]) == self.size:
            return picture
        return interpolate(picture[None], self.size, mode="bilinear", antialias=self.antialias)[0]


class Compose:
    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, picture: Any) -> Any:
        for transform in self.transforms:
            picture = transform(picture)
        return picture


class ToTensor:
    """(channels, height, width) in [0, 1]."""

    def __call__(self, image: Image) -> Tensor:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(one).view(-1, 1, 1) for one in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class Absent:
    """Named where a program begins, and not used by what we ask of it."""

    def __init__(self, *given: Any, **named: Any) -> None: ...

    def __call__(self, *given: Any, **named: Any) -> Any:
        raise NotImplementedError("this needs torchvision itself")


def __getattr__(name: str) -> type[Absent]:
    if not name[:1].isupper():
        raise AttributeError(name)
    return Absent
