"""A random tiny Z-Image V2 as a diffusers folder; it draws noise."""

from __future__ import annotations

from pathlib import Path

from whitetuner.families.z_image_tiny import write
from whitetuner.families.zimage_v2.transformer import ZImageV2Transformer2DModel


def make(folder: Path, variant: str) -> None:
    """Writes the folder. See registry.make_tiny, which has set the seed."""
    write(ZImageV2Transformer2DModel, folder, variant, n_layers=3, n_double_layers=2)
