"""What the plan needs of Z-Image V2 without its files: the converted release's config, and a sample's shapes."""

from __future__ import annotations

from typing import Any

from whitetuner.families.z_image_blank import blank
from whitetuner.families.z_image_facts import VARIANTS
from whitetuner.families.zimage_v2.spec import V2_CLASS

__all__ = ["RELEASED", "blank"]

#: Z-Image's 30 layers, half of them made dual-stream.
RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    variant: {"transformer": {"_class_name": V2_CLASS, "n_layers": 30, "n_double_layers": 15}}
    for variant in VARIANTS
}
