"""Names of Z-Image's modules in the files of other programs."""

from __future__ import annotations

from whitetuner.families.z_image_keys import V1_KEYS

KEYS = V1_KEYS
