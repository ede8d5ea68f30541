"""Masks as tensors: kept in the cache like what encoders say, and laid on the grid of a latent when they are read back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from whitetuner.data.masks import CELL_PX
from whitetuner.family import BuildFn, Layout, Reads
from whitetuner.records import EncodeInput


class MaskEncoder:
    """An encoder without a model: the mask's cells as float32 in [0, 1], (height / 8, width / 8), 1 exactly where it is white."""

    name = "mask"
    fields: Mapping[str, Layout] = {"mask": "stack"}
    reads: frozenset[Reads] = frozenset({"mask"})

    def fingerprint(self) -> str:
        return f"mask 1, cells of {CELL_PX}"

    def load(self, build: BuildFn) -> None:
        return

    def encode(self, given: EncodeInput) -> dict[str, torch.Tensor]:
        assert given.mask is not None, "asked about items with masks alone"
        return {"mask": torch.from_numpy(np.array(given.mask, dtype=np.float32)) / 255}

    def free(self) -> None:
        return


def counting(cells: torch.Tensor, floor: float, latent: torch.Tensor) -> torch.Tensor:
    """How much each place of a latent (C, [T,] H, W) counts, (H, W) float32: the mean of its cells, and not below `floor`."""
    height, width = latent.shape[-2:]
    rows, columns = cells.shape[0] // height, cells.shape[1] // width
    assert tuple(cells.shape) == (rows * height, columns * width), (
        f"a latent of {height} x {width} for a mask of {tuple(cells.shape)} cells of {CELL_PX} pixels"
    )
    area = cells.reshape(height, rows, width, columns).sum((1, 3)) / (rows * columns)
    return 1 - (1 - floor) * (1 - area)  # 1 exactly where all is white, whatever the floor


def all_counts(latent: torch.Tensor) -> torch.Tensor:
    """The mask of a sample that has none."""
    return torch.ones(latent.shape[-2:])
