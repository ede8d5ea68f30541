"""A swapped block answers `state_dict`, `load_state_dict` and `.to()` as if all of it were there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from whitetuner.memory.swap.engine import SwapEngine


class Guard:
    """Hooks of one block: state is read from the master and written to it, and moves leave the swapped
    tensors alone.
    """

    def __init__(self, engine: SwapEngine, index: int) -> None:
        self.engine, self.index = engine, index
        self.layout = engine.layouts[index]
        block = self.layout.block
        by_id = {id(entry.tensor): entry for entry in self.layout.entries}
        self.named = {
            name: by_id[id(tensor)]
            for name, tensor in (
                *block.named_parameters(remove_duplicate=False),
                *block.named_buffers(remove_duplicate=False),
            )
            if id(tensor) in by_id
        }
        self._handles = [
            block.register_state_dict_post_hook(lambda *a: self._give(*a)),  # torch writes an attribute on it
            block.register_load_state_dict_pre_hook(self._before_load),
            block.register_load_state_dict_post_hook(self._after_load),
        ]
        self._moves = block._apply
        block._apply = self._move  # type: ignore[method-assign]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        del self.layout.block.__dict__["_apply"]

    def _give(self, block: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        self.engine.flush()
        for name, entry in self.named.items():
            if prefix + name in state:
                state[prefix + name] = entry.view(self.engine.master(self.index))

    def _before_load(self, *_: Any) -> None:
        self.engine.backend.drain()
        self.engine.bind_home(self.index)

    def _after_load(self, *_: Any) -> None:
        self.engine.rewritten(self.index)

    def _move(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """`.to()` and its like: another device is the engine's business; another dtype is refused."""
        for entry in self.layout.entries:
            probe = torch.empty(0, dtype=entry.dtype)
            if fn(probe).dtype != entry.dtype:
                raise RuntimeError(
                    f"{self.layout.path} is swapped: detach the engine before casting the module"
                )
        bound = [entry.tensor.data for entry in self.layout.entries]
        for entry in self.layout.entries:
            entry.tensor.data = torch.empty(0, dtype=entry.dtype)
        try:
            self._moves(fn, recurse)
        finally:
            for entry, data in zip(self.layout.entries, bound, strict=True):
                entry.tensor.data = data
        return self.layout.block
