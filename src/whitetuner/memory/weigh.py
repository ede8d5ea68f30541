"""What a model weighs, from its own shapes: for the plan.

Full training needs more beside weights and activations. Of gradients one block's live at once, and those of what belongs to
no block; what the optimizer remembers lies with its block, on the device or on the host; a streamed block's goes up and down
once a step in two buffers, and its weights go down once (memory/fused.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil

from torch import nn

from whitetuner.memory.blocks import blocks_of
from whitetuner.memory.swap.layout import layouts_of

#: Operations of a transformer's step that a card does in the time of one byte from its own memory: 74 TFLOP/s reached against
#: 1 TB/s of an RTX 4090; others lie near.
_FLOPS_PER_BYTE = 75


@dataclass(frozen=True)
class Remembered:
    """Bytes for each trained number. state: what the optimizer keeps and what stands beside a bf16 weight;  average: of the
    running average, on the host;  sums: of gradients between the passes of a step (0: there is one pass);
    copies: of one tensor while it is updated;  touched: read and written by an update
    """

    state: float
    average: int = 0
    sums: int = 0
    copies: int = 16
    touched: int = 100


@dataclass(frozen=True)
class Whole:
    """Numbers that train in each block and outside of blocks; bytes of the blocks' gradients, and of their part that is
    written back;  largest: numbers of the largest tensor.
    """

    numbers: tuple[int, ...]
    gradients: tuple[int, ...]
    written: tuple[int, ...]
    rest_numbers: int
    rest_gradients: int
    largest: int
    kept: Remembered

    def on_device(self, streamed: Collection[int]) -> dict[str, int]:
        """Parts of the peak, by name."""
        there = self.rest_numbers + sum(n for i, n in enumerate(self.numbers) if i not in streamed)
        state = ceil(there * self.kept.state)
        turns = 2 * ceil(max((self.numbers[i] for i in streamed), default=0) * self.kept.state)
        return {
            "gradients of a block": max(self.gradients, default=0) + self.rest_gradients,
            "gradients between passes": there * self.kept.sums,
            "optimizer": state + turns,
            "update of a tensor": self.largest * self.kept.copies,
        }

    def on_host(self, streamed: Collection[int]) -> int:
        """Beside the weights themselves."""
        away = sum(self.numbers[i] for i in streamed)
        every = self.rest_numbers + sum(self.numbers)
        return ceil(away * (self.kept.state + self.kept.sums)) + every * self.kept.average

    def state_moved(self, streamed: Collection[int]) -> int:
        """Bytes that go up, and down again, in a backward pass."""
        return ceil(sum(self.numbers[i] for i in streamed) * self.kept.state)

    def written_back(self, streamed: Collection[int]) -> int:
        """Bytes of weights that go down in a step."""
        return sum(self.written[i] for i in streamed)

    def update_s(self, flops_per_s: float) -> float:
        """Seconds of all updates, from the bytes they touch."""
        numbers = self.rest_numbers + sum(self.numbers)
        return numbers * self.kept.touched * _FLOPS_PER_BYTE / flops_per_s


def whole_of(module: nn.Module, block_lists: Sequence[str], kept: Remembered) -> Whole:
    """From a module on any device, the meta device too, whose trained parameters require gradients."""
    blocks = blocks_of(module, block_lists)
    layouts = layouts_of(blocks, trained=True)
    numbers, gradients = [], []
    inside: set[int] = set()
    for _, block in blocks:
        own = [p for p in block.parameters() if p.requires_grad and id(p) not in inside]
        inside |= {id(p) for p in own}
        numbers.append(sum(p.numel() for p in own))
        gradients.append(sum(p.numel() * p.element_size() for p in own))
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in inside]
    every = [p.numel() for p in module.parameters() if p.requires_grad]
    return Whole(
        tuple(numbers),
        tuple(gradients),
        tuple(layout.trained_bytes for layout in layouts),
        sum(p.numel() for p in others),
        sum(p.numel() * p.element_size() for p in others),
        max(every, default=0),
        kept,
    )


@dataclass(frozen=True)
class Weights:
    """Bytes of a model in one base. blocks: what of each block can move;  rest: all else, adapters aside;
    trained: numbers of adapters;  whole: of full training.
    """

    blocks: tuple[int, ...]
    rest: int
    trained: int = 0
    whole: Whole | None = None


def weigh(
    module: nn.Module,
    block_lists: Sequence[str],
    smallest_bytes: int | None = None,
    kept: Remembered | None = None,
) -> Weights:
    """From a module on any device, the meta device too; what requires gradients is an adapter, or with `kept` the weights."""
    layouts = layouts_of(blocks_of(module, block_lists), smallest_bytes, kept is not None)
    moved = {id(entry.tensor) for layout in layouts for entry in layout.entries}
    rest = trained = 0
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.requires_grad and kept is None:
            trained += tensor.numel()
        elif id(tensor) not in moved:
            rest += tensor.numel() * tensor.element_size()
    whole = None if kept is None else whole_of(module, block_lists, kept)
    return Weights(tuple(layout.num_bytes for layout in layouts), rest, trained, whole)
