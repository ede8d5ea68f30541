"""A random tiny Z-Image as a diffusers folder; it draws noise."""

from __future__ import annotations

from pathlib import Path

from diffusers import ZImageTransformer2DModel

from whitetuner.families.z_image_tiny import write


def make(folder: Path, variant: str) -> None:
    """Writes the folder. See registry.make_tiny, which has set the seed."""
    write(ZImageTransformer2DModel, folder, variant, n_layers=3)
