"""A random tiny Z-Image V2 as a diffusers folder; it draws noise."""

from __future__ import annotations

from pathlib import Path

from whitetuner.families.z_image_tiny import write
from whitetuner.families.zimage_v2.spec import SPEC
from whitetuner.families.zimage_v2.transformer import ZImageV2Transformer2DModel


def make(folder: str | Path, variant: str | None = None, seed: int = 0) -> None:
    """Writes the folder; equal seeds, equal numbers. Raises UserError for an unknown variant or a folder in use."""
    write(SPEC, ZImageV2Transformer2DModel, folder, variant, seed, n_layers=3, n_double_layers=2)
