"""The diffusers pipeline of Z-Image, whole: what families/contract.py compares us with."""

from __future__ import annotations

from whitetuner.families.z_image_bench import ZImageReference


class Reference(ZImageReference):
    """See contract.Reference."""
