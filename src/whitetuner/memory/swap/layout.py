"""What of a block moves, and where it lies in one flat buffer: one copy brings a whole block.

A block's frozen weights and large buffers lie one after another in its master on the host; a device buffer
of the same layout is bound to the same Parameters by rebinding `.data`, so names, adapters and optimizers
keep their objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

#: Tensors start at multiples of this in a flat buffer: enough for every kernel, and torch.compile sees no
#: odd offsets.
ALIGN = 256
#: Smaller tensors (norms, biases) stay on the device: moving them saves nothing.
SMALLEST_BYTES = 65536
#: By how much a slot may exceed the largest block.
_SLACK = 0.02


@dataclass(frozen=True)
class Entry:
    """One tensor of a block: the Parameter or buffer itself, and its place in the flat buffer."""

    tensor: torch.Tensor
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """This tensor's part of a flat uint8 buffer of the block."""
        return flat[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class BlockLayout:
    """The tensors of one block that move. num_bytes: of the flat buffer, padding included.

    trained_bytes: its beginning, where the tensors that train lie: what an update changes
    """

    path: str
    block: nn.Module
    entries: tuple[Entry, ...]
    num_bytes: int
    trained_bytes: int = 0


def layouts_of(
    blocks: Sequence[tuple[str, nn.Module]], smallest_bytes: int | None = None, trained: bool = False
) -> list[BlockLayout]:
    """The layout of every block: its frozen parameters and its buffers of at least `smallest_bytes`.

    trained: what trains moves, too (full training; adapters stay)

    smallest_bytes: None: SMALLEST_BYTES, or a 64th of the largest tensor where that is less (a tiny model's norms and
                    biases stay, and its layers move, as the real one's do)

    Otherwise what trains stays on the device, and so does a tensor that two blocks share.
    """
    if smallest_bytes is None:
        largest = max(
            (t.numel() * t.element_size() for _, block in blocks for t in _tensors(block)), default=0
        )
        smallest_bytes = min(SMALLEST_BYTES, largest // 64)
    owners: dict[int, set[int]] = {}
    for index, (_, block) in enumerate(blocks):
        for tensor in _tensors(block):
            owners.setdefault(id(tensor), set()).add(index)
    layouts = []
    for path, block in blocks:
        entries, offset, changed = [], 0, 0
        for tensor in sorted(_tensors(block), key=lambda one: not one.requires_grad):
            size = tensor.numel() * tensor.element_size()
            stays = tensor.requires_grad and not trained
            if stays or size < max(1, smallest_bytes) or len(owners[id(tensor)]) > 1:
                continue
            entries.append(Entry(tensor, offset, tensor.shape, tensor.dtype))
            offset += padded(size)
            changed = offset if tensor.requires_grad else changed
        layouts.append(BlockLayout(path, block, tuple(entries), offset, changed))
    return layouts


def _tensors(block: nn.Module) -> Iterable[torch.Tensor]:
    yield from block.parameters()
    yield from block.buffers()


def small_of(layouts: Sequence[BlockLayout], trained: bool = False) -> list[torch.Tensor]:
    """The frozen tensors of the blocks that do not move, each once. trained: those that train, too (not adapters)."""
    moving = {id(entry.tensor) for layout in layouts for entry in layout.entries}
    each = (t for layout in layouts for t in _tensors(layout.block))
    found = {id(t): t for t in each if trained or not t.requires_grad}
    return [tensor for key, tensor in found.items() if key not in moving]


@torch.no_grad()
def carry(tensors: Sequence[torch.Tensor], flat: torch.Tensor, *, write: bool) -> None:
    """Into a flat uint8 buffer one after another, or out of it."""
    offset = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        part = flat[offset : offset + size].view(tensor.dtype).view(tensor.shape)
        (part if write else tensor.data).copy_(tensor.data if write else part)
        offset += padded(size)


def padded(num_bytes: int) -> int:
    """Rounded up to a multiple of ALIGN."""
    return -(-num_bytes // ALIGN) * ALIGN


def spread(sizes: Sequence[int], resident_bytes: int) -> frozenset[int]:
    """Which blocks stay on the device: as many bytes as fit into `resident_bytes`, spread evenly over the
    order.

    Walking through the blocks, each takes its share of the budget; whenever a whole block's worth has come
    together, that block stays. Streamed blocks so lie at even distances and the link is busy at an even rate.
    The first and the last block are streamed as long as others can stay: at the turn of a pass the slots are
    full and the link rests until the first streamed block is done with.
    """
    total = sum(sizes)
    if resident_bytes >= total:
        return frozenset(range(len(sizes)))
    ends = {0, len(sizes) - 1}
    inner = total - sum(sizes[i] for i in ends)
    kept, used, due = set(), 0, 0.0
    share = min(1.0, resident_bytes / inner) if inner else 0.0
    for index, size in enumerate(sizes):
        if index in ends:
            continue
        due += size * share
        if used + size <= resident_bytes and due >= used + size / 2:
            kept.add(index)
            used += size
    for index in sorted(set(range(len(sizes))) - kept, key=lambda i: (i in ends, -sizes[i])):
        if used + sizes[index] <= resident_bytes:
            kept.add(index)
            used += sizes[index]
    return frozenset(kept)


def spread_count(count: int, residents: int) -> frozenset[int]:
    """`residents` of `count` equal blocks, the others at even distances from the first to the last."""
    streamed = count - residents
    if streamed == 1:
        return frozenset(range(count)) - {count // 2}
    gaps = 2 * (streamed - 1)
    away = {(2 * i * (count - 1) + streamed - 1) // gaps for i in range(streamed)}
    return frozenset(range(count)) - away


def slot_bytes(sizes: Sequence[int]) -> int:
    """Of one slot for blocks of these sizes: the largest block, or as many smaller ones as take its place.

    FLUX.2's single blocks are half as large as its double blocks, in int8 with their scales a few kilobytes more
    than half: a slot may be larger than the largest block by _SLACK for the sake of these.
    """
    most = padded(max(sizes, default=0))
    room = int(most * (1 + _SLACK))
    return max([most, *(room // padded(size) * padded(size) for size in sizes if size)])


def units(sizes: Sequence[int], streamed: Sequence[int]) -> list[tuple[int, ...]]:
    """Streamed blocks in groups that fill a slot, in running order: what of them fits into how many slots."""
    if not streamed:
        return []
    room = slot_bytes([sizes[i] for i in streamed])
    groups: list[list[int]] = []
    filled = room
    for index in streamed:
        size = padded(sizes[index])
        if filled + size > room:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    return [tuple(group) for group in groups]
