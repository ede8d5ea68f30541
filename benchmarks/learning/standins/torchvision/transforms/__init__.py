"""What diffusers' Klein script takes from torchvision.transforms, by torchvision's documentation."""

from __future__ import annotations

import random
from enum import Enum

from PIL.Image import Image, Resampling


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
