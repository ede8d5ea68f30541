"""A random tiny Z-Image as a diffusers folder; it draws noise."""

from __future__ import annotations

from pathlib import Path

from diffusers import ZImageTransformer2DModel

from whitetuner.families.z_image_tiny import write
from whitetuner.families.zimage.spec import SPEC


def make(folder: str | Path, variant: str | None = None, seed: int = 0) -> None:
    """Writes the folder; equal seeds, equal numbers. Raises UserError for an unknown variant or a folder in use."""
    write(SPEC, ZImageTransformer2DModel, folder, variant, seed, n_layers=3)
