"""A batch goes through each block a few samples at a time: one load and one update of the block serve all pieces.

Put on around a block's checkpoint and under block swap: the swap sees one call of the block; each piece is kept and
computed again by itself, so that what a block saves inside exists for one piece. The pieces' gradients meet in autograd
before they reach a parameter, which therefore hears of one gradient for the whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from whitetuner.errors import UserError


@dataclass(frozen=True)
class MicroBatches:
    """samples: of a piece;  per_sample: arguments of a block's forward that hold the batch in dim 0, see Part"""

    samples: int
    per_sample: tuple[str, ...]

    def wrap(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(type(block).forward)

        def pieced(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            given = signature.bind(block, *args, **kwargs).arguments
            named = {name: given[name] for name in self.per_sample if name in given}
            count = _batch(named)
            if count <= self.samples:
                return forward(*args, **kwargs)
            for name, value in named.items():
                _require_cuttable(name, value, count)
            done = []
            for start in range(0, count, self.samples):
                end = min(start + self.samples, count)
                bound = signature.bind(block, *args, **kwargs)
                for name, value in named.items():
                    bound.arguments[name] = _cut(value, start, end)
                done.append(forward(*bound.args[1:], **bound.kwargs))
            return _joined(done)

        return pieced


def micro_batches(samples: int, per_sample: tuple[str, ...], part: str) -> MicroBatches | None:
    """None for 0 samples. Raises UserError where the part does not say what belongs to a sample."""
    if not samples:
        return None
    if not per_sample:
        raise UserError(
            "the part {part} does not say which arguments of its blocks belong to samples",
            where="memory.micro_batch",
            mend="set memory.micro_batch = 0",
            part=part,
        )
    return MicroBatches(samples, per_sample)


def _batch(named: dict[str, Any]) -> int:
    return next((len(value) for value in named.values() if isinstance(value, torch.Tensor)), 0)


def _require_cuttable(name: str, value: Any, count: int) -> None:
    for leaf in tree_flatten(value)[0]:
        tensor = isinstance(leaf, torch.Tensor)
        if (tensor and (leaf.ndim == 0 or len(leaf) not in (1, count))) or not (
            tensor or leaf is None or isinstance(leaf, bool | int | float | str)
        ):
            raise UserError(
                "a block's argument {argument} cannot be cut by samples",
                where="memory.micro_batch",
                mend="set memory.micro_batch = 0",
                argument=name,
            )


def _cut(value: Any, start: int, end: int) -> Any:
    """One row serves every sample."""
    return tree_map(
        lambda leaf: leaf[start:end] if isinstance(leaf, torch.Tensor) and len(leaf) > 1 else leaf, value
    )


def _joined(done: list[Any]) -> Any:
    if isinstance(done[0], torch.Tensor):
        return torch.cat(done)
    if isinstance(done[0], tuple):
        return tuple(_joined([one[i] for one in done]) for i in range(len(done[0])))
    assert done[0] is None, f"a block gave {type(done[0]).__name__}"
    return None
