"""Names of Z-Image's modules in the files of other programs."""

from __future__ import annotations

from whitetuner.families.z_image_keys import MODULATED, PLAIN, ZImageKeys

KEYS = ZImageKeys("Z-Image", {"noise_refiner": MODULATED, "context_refiner": PLAIN, "layers": MODULATED})
