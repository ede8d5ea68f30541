"""Where each block is: resident, in a slot, or away; and the copies that change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from whitetuner.memory.swap.backend import Backend, Counters, Mark
from whitetuner.memory.swap.layout import BlockLayout, slot_bytes, units
from whitetuner.memory.swap.schedule import EMPTY, Ring, Spot

#: Views kept for each block, one set for each spot that it came to lie in; in a steady run there are few.
_MOST_VIEWS = 16


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

    streamed: the blocks that take turns;  number: block -> its place in `streamed`, None of a resident
    ring:     which streamed block (by number) is where;  kept: buffers of the residents
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
        self.streamed = [i for i in range(len(sizes)) if i not in residents]
        self.number: list[int | None] = [None] * len(sizes)
        for number, index in enumerate(self.streamed):
            self.number[index] = number
        turns = [sizes[i] for i in self.streamed]
        room = slot_bytes(turns)
        self.ring = Ring(turns, min(slots, len(units(sizes, self.streamed))), room)
        self.buffers = [backend.slot(room) for _ in self.ring.within]
        self._slot_at = {buffer.untyped_storage().data_ptr(): s for s, buffer in enumerate(self.buffers)}
        self._freed: list[dict[tuple[int, int], tuple[int, tuple[Mark, ...]]]] = [{} for _ in self.buffers]
        self._stored: dict[int, Mark] = {}
        self._unsettled: list[Mark] = []
        self.dirty: set[int] = set()
        self._releases = 0
        self._ready: dict[int, Mark] = {}
        self._views: dict[tuple[int, Spot], list[torch.Tensor]] = {}
        self.kept = {index: backend.slot(sizes[index]) for index in sorted(residents)}
        for index in range(len(sizes)):
            if index in self.kept:
                self._load_resident(index, ())
            else:
                self._bind_away(index)
        for number in range(len(turns)):
            found = self.ring.room(number, frozenset(), {})
            if found is None or found[1] != EMPTY:
                break
            self.load(number, found[0])
        self.counters = Counters()

    @property
    def device_bytes(self) -> int:
        """Bytes of all slots and residents."""
        return sum(buffer.numel() for buffer in (*self.buffers, *self.kept.values()))

    def load(self, number: int, spot: Spot) -> None:
        """Begins to load a streamed block into a spot; whoever was there is away from now on."""
        for other in self.ring.put(number, spot):
            self._bind_away(self.streamed[other])
            self._ready.pop(self.streamed[other], None)
        index = self.streamed[number]
        self.backend.clear(self._part(index, spot))
        self._load_block(index, spot, self._free_since(index, spot))
        self.counters.loads += 1
        self.counters.bytes_up += self.layouts[index].num_bytes
        self.counters.of_block[index] += 1

    def _free_since(self, index: int, spot: Spot) -> tuple[Mark, ...]:
        """The end of the last computation that reads what the block will overwrite, and of the copies back from
        there; nothing when nothing was there.
        """
        start, end = spot.start, spot.start + self.layouts[index].num_bytes
        freed = self._freed[spot.slot]
        met = [place for place in freed if place[0] < end and start < place[1]]
        last = max((freed[place] for place in met), key=lambda release: release[0], default=None)
        marks = () if last is None else (*last[1], *(copy for place in met for copy in freed[place][1][1:]))
        for place in met:
            if start <= place[0] and place[1] <= end:
                del freed[place]
        return marks

    def _load_block(self, index: int, spot: Spot, free: tuple[Mark, ...]) -> None:
        part = self._part(index, spot)
        written = [self._stored.pop(index)] if index in self._stored else []
        self._ready[index] = self.backend.load(part, self.masters[index], [*free, *written])
        if (index, spot) not in self._views:
            if len(self._views) > _MOST_VIEWS * len(self.streamed):
                self._views.clear()
            self._views[index, spot] = [entry.view(part) for entry in self.layouts[index].entries]
        for entry, view in zip(self.layouts[index].entries, self._views[index, spot], strict=True):
            entry.tensor.data = view

    def _load_resident(self, index: int, free: tuple[Mark, ...]) -> None:
        self._ready[index] = self.backend.load(self.kept[index], self.masters[index], free)
        for entry in self.layouts[index].entries:
            entry.tensor.data = entry.view(self.kept[index])

    def _part(self, index: int, spot: Spot) -> torch.Tensor:
        return self.buffers[spot.slot][spot.start : spot.start + self.layouts[index].num_bytes]

    def _bind_away(self, index: int) -> None:
        for entry in self.layouts[index].entries:
            entry.tensor.data = self.backend.away(entry.view(self.masters[index]), entry.tensor.requires_grad)

    def arrive(self, index: int) -> None:
        """What is computed from now on finds the block's weights whole."""
        mark = self._ready.pop(index, None)
        if mark is not None:
            self.backend.wait(mark)

    def spot(self, index: int) -> Spot | None:
        """Where a streamed block is; None when it is away or a resident."""
        number = self.number[index]
        return None if number is None else self.ring.place[number]

    def released(self, index: int) -> None:
        """All that was computed up to now, and nothing later, reads the block's spot."""
        spot = self.spot(index)
        if spot is not None:
            self._releases += 1
            place = spot.start, spot.start + self.layouts[index].num_bytes
            stored = (self._stored[index],) if index in self._stored else ()
            self._freed[spot.slot][place] = self._releases, (self.backend.mark(), *stored)

    def write_back(self, index: int) -> None:
        """The block's trained tensors were changed where they lie now; its master follows.

        That of a streamed block at once, while other blocks are computed; that of a resident, which never leaves,
        when it is asked for (`flush`).
        """
        if index in self.kept:
            self.dirty.add(index)
            return
        spot = self.spot(index)
        assert spot is not None, "a block was trained that is away"
        self._store(index, self._part(index, spot))

    def _store(self, index: int, lies: torch.Tensor) -> None:
        size = self.layouts[index].trained_bytes
        self._stored[index] = self.backend.store(self.masters[index][:size], lies[:size], self.backend.mark())
        self._unsettled.append(self._stored[index])
        self.counters.copies_back += 1
        self.counters.bytes_down += size

    def settle(self) -> None:
        """Returns when every copy back that was begun has arrived."""
        for mark in self._unsettled:
            self.backend.finish(mark)
        self._unsettled.clear()

    def flush(self) -> None:
        """Returns when every master holds what its block holds."""
        for index in sorted(self.dirty):
            self._store(index, self.kept[index])
        self.dirty.clear()
        self._unsettled.clear()
        self.backend.drain()

    def reload(self, index: int) -> None:
        """The master was rewritten: what lies on the device of this block is replaced."""
        self.backend.drain()
        self.dirty.discard(index)
        if index in self.kept:
            self._load_resident(index, (self.backend.mark(),))
            return
        spot = self.spot(index)
        if spot is None:
            self._bind_away(index)
        else:
            self._load_block(index, spot, (self.backend.mark(),))

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Packed:
        """A tensor that lies in a slot as (block, place); any other as it is."""
        slot = self._slot_at.get(tensor.untyped_storage().data_ptr())
        if slot is None:
            return tensor
        at = int(tensor.storage_offset()) * tensor.element_size()
        for number in self.ring.within[slot]:
            index = self.streamed[number]
            spot = self.ring.place[number]
            assert spot is not None
            if spot.start <= at < spot.start + self.layouts[index].num_bytes:
                return Packed(index, at - spot.start, tensor.shape, tensor.stride(), tensor.dtype)
        raise AssertionError("a tensor was saved that lies in a slot but in no block of it")

    def find(self, packed: Packed) -> torch.Tensor:
        """The tensor where its block is now; the block must be there."""
        buffer, start = self.kept.get(packed.block), 0
        if buffer is None:
            spot = self.spot(packed.block)
            assert spot is not None, "the block of a saved tensor is away"
            buffer, start = self.buffers[spot.slot], spot.start
        found = torch.empty(0, dtype=packed.dtype, device=buffer.device)
        at = (start + packed.offset) // found.element_size()
        return found.set_(buffer.untyped_storage(), at, packed.shape, packed.stride)
