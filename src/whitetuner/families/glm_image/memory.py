"""What a block of the model keeps of a given picture, and how it is recalled beside the target.

Each block asks such an object for its `mode` and calls `store` or `get` (diffusers GlmImageLayerKVCache). Theirs changes its
mode between the passes, so that a block that is computed again in the backward pass would do something else than the first
time; each of these does one thing only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Kept:
    """Takes down the keys and values of one given picture in one block, (B, tokens, heads, width)."""

    mode = "write"

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def store(self, key: Tensor, value: Tensor) -> None:
        """The first time counts: later the block is computed again for its gradients."""
        if self.key is None:
            self.key, self.value = key, value


class Recalled:
    """Puts what was kept of all given pictures before the target's own keys and values."""

    mode = "read"

    def __init__(self, kept: Sequence[Kept]) -> None:
        self.kept = kept

    def get(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys = [one.key for one in self.kept if one.key is not None]
        values = [one.value for one in self.kept if one.value is not None]
        return torch.cat([*keys, key], 1), torch.cat([*values, value], 1)
