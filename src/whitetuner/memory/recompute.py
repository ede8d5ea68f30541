"""Blocks that keep only their inputs and are computed again in the backward pass (gradient checkpointing),
by choice.

Non-reentrant torch checkpoints: they take keyword arguments, work when no input needs a gradient, and stop
the second computation at the last tensor that is needed. Put on before block swap, so that the swap sees
each block called once and finds out about its backward pass from the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from whitetuner.memory.blocks import Patch, Which, blocks_of, chosen
from whitetuner.memory.micro import MicroBatches


class Recompute:
    """Handle of the checkpoints on a module's blocks.

    which:  indices (over all lists, in running order) of the blocks that are computed again
    runs:   how often each block's forward has run since `reset_counts`: 2 a step when checkpointed, 1 when
            not; times the pieces of a batch that goes through the blocks in pieces
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        which: frozenset[int],
        keep_inputs: Callable[[], AbstractContextManager[Any]],
        micro: MicroBatches | None = None,
    ) -> None:
        self.which = which
        self.runs = [0] * len(blocks)
        self._keep_inputs = keep_inputs
        self._patches = []
        for i, block in enumerate(blocks):
            wrapped = self._wrap(i, block.forward)
            self._patches.append(Patch(block, wrapped if micro is None else micro.wrap(block, wrapped)))

    def _wrap(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.runs[index] += 1
            return forward(*args, **kwargs)

        if index not in self.which:
            return counted

        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return counted(*args, **kwargs)
            # All tensors by position: only those a checkpoint saves through autograd, where `keep_inputs`
            # sees them.
            leaves, spec = tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

            def call(*tensors: torch.Tensor) -> Any:
                filled = list(leaves_without)
                for place, tensor in zip(places, tensors, strict=True):
                    filled[place] = tensor
                given, named = tree_unflatten(filled, spec)
                return counted(*given, **named)

            leaves_without = [None if i in places else leaf for i, leaf in enumerate(leaves)]
            with self._keep_inputs():
                return checkpoint(call, *(leaves[i] for i in places), use_reentrant=False)

        return checkpointed

    def reset_counts(self) -> None:
        self.runs = [0] * len(self.runs)

    def remove(self) -> None:
        """Takes the checkpoints off again."""
        for patch in self._patches:
            patch.remove()
        self._patches = []


def checkpoint_blocks(
    module: nn.Module,
    block_lists: Sequence[str],
    which: Which = "all",
    *,
    keep_inputs: Callable[[], AbstractContextManager[Any]] = nullcontext,
    micro: MicroBatches | None = None,
) -> Recompute:
    """Checkpoints "all", "none" or the given blocks (indices over all lists) of a module.

    keep_inputs: context in which a checkpoint saves the block's inputs (offload.InputsOnHost.saving moves
                 them to the host). The module's own checkpointing (diffusers) is switched off: two of them
                 would compute thrice.
    micro:       a batch goes through each block in pieces, each with a checkpoint of its own
    """
    if getattr(module, "is_gradient_checkpointing", False):
        module.disable_gradient_checkpointing()  # type: ignore[operator]
    blocks = [block for _, block in blocks_of(module, block_lists)]
    return Recompute(blocks, chosen(which, len(blocks)), keep_inputs, micro)


class TokenChunks:
    """Handle of feed-forwards that run, and are computed again, in pieces of the token dimension."""

    def __init__(self, patches: list[Patch]) -> None:
        self._patches = patches

    def remove(self) -> None:
        for patch in self._patches:
            patch.remove()
        self._patches = []


def chunk_tokens(modules: Sequence[nn.Module], tokens: int) -> TokenChunks:
    """Runs modules that treat every token alike (feed-forwards) on at most `tokens` tokens at a time,
    checkpointed.

    x (B, N, C) is their first argument. The second level for long videos: within a checkpointed block, what
    the feed-forward saves (several times its input) exists for one piece only. Sums over tokens are rounded
    in another order than without pieces, so gradients agree to rounding, not to the bit.
    """
    assert tokens > 0

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def chunked(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if x.ndim < 3 or x.shape[-2] <= tokens:
                return forward(x, *args, **kwargs)
            pieces = x.split(tokens, dim=-2)
            if not torch.is_grad_enabled():
                return torch.cat([forward(piece, *args, **kwargs) for piece in pieces], dim=-2)
            done = [checkpoint(forward, piece, *args, use_reentrant=False, **kwargs) for piece in pieces]
            return torch.cat(done, dim=-2)

        return chunked

    return TokenChunks([Patch(module, wrap(module.forward)) for module in modules])
