"""Names of Z-Image V2's modules in files. No other program knows the model: full states keep their names."""

from __future__ import annotations

from whitetuner.families.z_image_keys import MODULATED, PLAIN, TWO_STREAMS, ZImageKeys

KEYS = ZImageKeys(
    "Z-Image V2",
    {
        "noise_refiner": MODULATED,
        "context_refiner": PLAIN,
        "double_stream_layers": TWO_STREAMS,
        "layers": MODULATED,
    },
    original=False,
    class_name="ZImageV2Transformer2DModel",
)
