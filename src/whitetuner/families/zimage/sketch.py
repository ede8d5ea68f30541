"""What the plan needs of Z-Image without its files: the released transformer's config, and a sample's shapes."""

from __future__ import annotations

from typing import Any

from whitetuner.families.z_image_blank import blank
from whitetuner.families.z_image_facts import V1_CLASS, VARIANTS

__all__ = ["RELEASED", "blank"]

#: The class's defaults are the release's (transformer/config.json of Tongyi-MAI/Z-Image-Turbo); the three are alike.
RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    variant: {"transformer": {"_class_name": V1_CLASS, "n_layers": 30}} for variant in VARIANTS
}
