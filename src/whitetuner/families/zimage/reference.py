"""The diffusers pipeline of Z-Image, whole: what families/contract.py compares us with."""

from __future__ import annotations

from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

from whitetuner.families.contract import OriginalReader
from whitetuner.families.z_image_bench import ZImageReference

READS_ORIGINAL = OriginalReader(convert_z_image_transformer_checkpoint_to_diffusers)


class Reference(ZImageReference):
    """See contract.Reference."""
