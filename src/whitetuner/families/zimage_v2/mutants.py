"""Z-Image V2 with one convention wrong at a time; families/contract.py has to tell each of them."""

from __future__ import annotations

from whitetuner.families.z_image_bench import MUTANTS

__all__ = ["MUTANTS"]
