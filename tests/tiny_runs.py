"""A tiny model and a few pictures with captions, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from whitetuner.families import registry
from whitetuner.tiny import tiny_values


def tiny_place(folder: Path, pictures: int, out: str = "out") -> dict[str, Any]:
    """FLUX.2 klein in folder/model, captioned pictures in folder/data; -> the config's values, runs in folder/out."""
    registry.make_tiny("flux2-klein", str(folder / "model"))
    (folder / "data").mkdir()
    for index in range(pictures):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{index}.png")
        (folder / "data" / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
    return tiny_values("flux2-klein", folder / "model", folder / "data", folder / out)
