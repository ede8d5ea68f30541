"""The blocks of a denoiser in the order they run, found by the names of the lists that a family declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

Which = str | Iterable[int]


def blocks_of(module: nn.Module, block_lists: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """(path, block) of every block of the lists, in running order. block_lists: dotted names of
    nn.ModuleLists.

    Raises ValueError, naming what the module has, when a name is not a list of modules or no block is left.
    """
    found = []
    for name in block_lists:
        try:
            blocks = module.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"{type(module).__name__} has no block list '{name}'") from error
        if not isinstance(blocks, nn.ModuleList | nn.Sequential):
            raise ValueError(
                f"{type(module).__name__}.{name} is a {type(blocks).__name__}, not a list of blocks"
            )
        found += [(f"{name}.{index}", block) for index, block in enumerate(blocks)]
    if not found:
        raise ValueError(f"{type(module).__name__} has no blocks in {tuple(block_lists)}")
    return found


def chosen(which: Which, count: int) -> frozenset[int]:
    """Indices meant by "all", "none" or a collection of indices. Raises ValueError for one out of range."""
    if isinstance(which, str):
        if which not in ("all", "none"):
            raise ValueError(f"which blocks: 'all', 'none' or indices, not {which!r}")
        return frozenset(range(count)) if which == "all" else frozenset()
    indices = frozenset(which)
    if any(not 0 <= index < count for index in indices):
        raise ValueError(f"block indices {sorted(indices)} with {count} blocks")
    return indices


class Patch:
    """Another forward on one module, taken back in the reverse order of putting on."""

    def __init__(self, block: nn.Module, wrapper: Callable[..., Any]) -> None:
        self.block, self.wrapper = block, wrapper
        self.before = block.__dict__.get("forward")
        block.forward = wrapper

    def remove(self) -> None:
        assert self.block.__dict__.get("forward") is self.wrapper, (
            "patches of a block come off in reverse order"
        )
        if self.before is None:
            del self.block.forward
        else:
            self.block.forward = self.before
