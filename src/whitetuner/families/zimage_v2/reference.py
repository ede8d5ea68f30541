"""The diffusers pipeline of Z-Image around V2, whole: what families/contract.py compares us with.

V2 has no pipeline of its own; diffusers finds its class by the name that model_index.json gives.
"""

from __future__ import annotations

from whitetuner.families.z_image_bench import ZImageReference


class Reference(ZImageReference):
    """See contract.Reference."""
