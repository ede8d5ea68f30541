"""Where each block is: resident, in a slot, or away; and the copies that change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from whitetuner.memory.swap.backend import Backend, Counters, Mark
from whitetuner.memory.swap.layout import BlockLayout, padded, units
from whitetuner.memory.swap.schedule import Ring


class Packed(NamedTuple):
    """A saved tensor that lay in a slot: found again by its block and its place (bytes) in the block's
    buffer.
    """

    block: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Placement:
    """Buffers on the device and what is in them. Blocks are named by their index over all lists.

    groups: streamed blocks that share a slot;  ring: which group is in which slot;  kept: buffers of the
            residents
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        masters: Sequence[torch.Tensor],
        backend: Backend,
        residents: frozenset[int],
        slots: int,
    ) -> None:
        self.layouts, self.masters, self.backend = layouts, masters, backend
        self.counters = Counters()
        sizes = [layout.num_bytes for layout in layouts]
        self.groups = units(sizes, [i for i in range(len(sizes)) if i not in residents])
        self.group_of: list[int | None] = [None] * len(sizes)
        self._start = [0] * len(sizes)
        for number, group in enumerate(self.groups):
            start = 0
            for index in group:
                self.group_of[index], self._start[index] = number, start
                start += padded(sizes[index])
        self.ring = Ring(len(self.groups), slots)
        room = max((sum(padded(sizes[i]) for i in group) for group in self.groups), default=0)
        self.buffers = [backend.slot(room) for _ in self.ring.holder]
        self._slot_at = {buffer.untyped_storage().data_ptr(): s for s, buffer in enumerate(self.buffers)}
        self._free: list[Mark | None] = [None] * len(self.buffers)
        self._ready: dict[int, Mark] = {}
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.kept = {index: backend.slot(sizes[index]) for index in sorted(residents)}
        for index in range(len(sizes)):
            if index in self.kept:
                self._load_resident(index, None)
            else:
                self._bind_away(index)
        for number in range(min(len(self.buffers), len(self.groups))):
            self.load(number, number)
        self.counters = Counters()

    @property
    def device_bytes(self) -> int:
        """Bytes of all slots and residents."""
        return sum(buffer.numel() for buffer in (*self.buffers, *self.kept.values()))

    def load(self, group: int, slot: int) -> None:
        """Begins to load a group into a slot; whoever was there is away from now on."""
        old = self.ring.put(group, slot)
        for index in self.groups[old] if old is not None else ():
            self._bind_away(index)
            self._ready.pop(index, None)
        self.backend.clear(self.buffers[slot])
        members = self.groups[group]
        if self.ring.itinerary.kind == "backward":
            members = members[::-1]
        for index in members:
            self._load_block(index, slot, self._free[slot])
            self.counters.loads += 1
            self.counters.bytes_up += self.layouts[index].num_bytes
            self.counters.of_block[index] += 1

    def _load_block(self, index: int, slot: int, free: Mark | None) -> None:
        self._ready[index] = self.backend.load(self._part(index, slot), self.masters[index], free)
        if (index, slot) not in self._views:
            part = self._part(index, slot)
            self._views[index, slot] = [entry.view(part) for entry in self.layouts[index].entries]
        for entry, view in zip(self.layouts[index].entries, self._views[index, slot], strict=True):
            entry.tensor.data = view

    def _load_resident(self, index: int, free: Mark | None) -> None:
        self._ready[index] = self.backend.load(self.kept[index], self.masters[index], free)
        for entry in self.layouts[index].entries:
            entry.tensor.data = entry.view(self.kept[index])

    def _part(self, index: int, slot: int) -> torch.Tensor:
        return self.buffers[slot][self._start[index] : self._start[index] + self.layouts[index].num_bytes]

    def _bind_away(self, index: int) -> None:
        for entry in self.layouts[index].entries:
            entry.tensor.data = self.backend.away(entry.view(self.masters[index]))

    def arrive(self, index: int) -> None:
        """What is computed from now on finds the block's weights whole."""
        mark = self._ready.pop(index, None)
        if mark is not None:
            self.backend.wait(mark)

    def released(self, index: int) -> None:
        """All that was computed up to now, and nothing later, reads the block's slot."""
        group = self.group_of[index]
        slot = None if group is None else self.ring.place[group]
        if slot is not None:
            self._free[slot] = self.backend.mark()

    def reload(self, index: int) -> None:
        """The master was rewritten: what lies on the device of this block is replaced."""
        self.backend.drain()
        group = self.group_of[index]
        if group is None:
            self._load_resident(index, self.backend.mark())
            return
        slot = self.ring.place[group]
        if slot is None:
            self._bind_away(index)
        else:
            self._load_block(index, slot, self.backend.mark())

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Packed:
        """A tensor that lies in a slot as (block, place); any other as it is."""
        slot = self._slot_at.get(tensor.untyped_storage().data_ptr())
        if slot is None:
            return tensor
        at = int(tensor.storage_offset()) * tensor.element_size()
        group = self.ring.holder[slot]
        assert group is not None
        index = max((i for i in self.groups[group] if self._start[i] <= at), key=lambda i: self._start[i])
        return Packed(index, at - self._start[index], tensor.shape, tensor.stride(), tensor.dtype)

    def find(self, packed: Packed) -> torch.Tensor:
        """The tensor where its block is now; the block must be there."""
        buffer, start = self.kept.get(packed.block), 0
        if buffer is None:
            group = self.group_of[packed.block]
            slot = None if group is None else self.ring.place[group]
            assert slot is not None, "the block of a saved tensor is away"
            buffer, start = self.buffers[slot], self._start[packed.block]
        found = torch.empty(0, dtype=packed.dtype, device=buffer.device)
        at = (start + packed.offset) // found.element_size()
        return found.set_(buffer.untyped_storage(), at, packed.shape, packed.stride)
