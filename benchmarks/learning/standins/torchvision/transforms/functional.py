"""What diffusers' Klein script and the peers take from torchvision.transforms.functional; sizes are (height, width)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Image
from torch import Tensor

from torchvision.transforms import InterpolationMode


def resize(image: Image, size: Sequence[int], interpolation: InterpolationMode) -> Image:
    return image.resize((size[1], size[0]), interpolation.value)


def crop(image: Image | Tensor, top: int, left: int, height: int, width: int) -> Image | Tensor:
    if isinstance(image, Tensor):
        return image[..., top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Image, size: Sequence[int]) -> Image:
    height, width = size
    return crop(image, round((image.height - height) / 2), round((image.width - width) / 2), height, width)


def hflip(image: Image) -> Image:
    return ImageOps.mirror(image)


def pil_to_tensor(image: Image) -> Tensor:
    """(channels, height, width), whole numbers."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def to_tensor(image: Image) -> Tensor:
    """(channels, height, width) in [0, 1]."""
    return pil_to_tensor(image).float() / 255


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
