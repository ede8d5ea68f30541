"""What OneTrainer's data loader takes from torchvision.io, by torchvision's documentation."""

from __future__ import annotations

from enum import Enum

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class ImageReadMode(Enum):
    GRAY = "L"
    RGB = "RGB"


def read_image(path: str, mode: ImageReadMode, apply_exif_orientation: bool = False) -> Tensor:
    """(channels, height, width), whole numbers."""
    pixels = np.array(Image.open(path).convert(mode.value))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
