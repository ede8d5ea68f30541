"""Which block is loaded next, where to, and which ones make room for it. Plain numbers, no tensors, no
device.

Blocks are used in passes: forwards in their order, backwards in the reverse. What comes next is foretold
from what came last time: a pass of a kind visits what the last one of its kind visited, and after the last
three passes comes what came after them before (so two forwards ahead of two backwards are foretold as well
as the plain pair). A wrong guess costs a wait for one load, never a wrong weight.

With B slots and S streamed blocks of equal size a forward and a backward pass load 2 (S - B) blocks, which is
the least possible: each pass touches all of them and begins with at most B of them there (reference: Belady
1966, evict what is needed last). Smaller blocks lie several to a slot, each with a place and a turn of its
own: a place is free as soon as its own block is done with, whatever its neighbour in the slot does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward", "sampling"]
_FAR = 1 << 30
#: The use of what is empty: later than any.
EMPTY = _FAR + 1


class Itinerary:
    """Foretells the uses of `count` blocks from the uses seen so far."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kind: Kind = "forward"
        self.seen: list[int] = []
        self._last: dict[Kind, list[int]] = {}
        self._after: dict[tuple[Kind, ...], Kind] = {}
        self._kinds: tuple[Kind, ...] = ()

    def use(self, block: int, kind: Kind) -> None:
        """Notes that a block is used now, in a pass of this kind."""
        if self.seen and self.seen[-1] == block and kind == self.kind:
            return
        if kind != self.kind or block in self.seen:
            self._close()
            self.kind = kind
        self.seen.append(block)

    def _close(self) -> None:
        if not self.seen:
            return
        self._last[self.kind] = self.seen
        for length in range(1, len(self._kinds) + 1):
            self._after[self._kinds[-length:]] = self.kind
        self._kinds = (*self._kinds, self.kind)[-3:]
        self.seen = []

    def _visits(self, kind: Kind, forward: list[int]) -> list[int]:
        if kind in self._last:
            return self._last[kind]
        return forward[::-1] if kind == "backward" else forward

    def _next_kind(self, kinds: tuple[Kind, ...]) -> Kind:
        for length in range(len(kinds), 0, -1):
            if kinds[-length:] in self._after:
                return self._after[kinds[-length:]]
        return {"forward": "backward", "backward": "forward", "sampling": "sampling"}[kinds[-1]]  # type: ignore[return-value]

    def ahead(self) -> Iterator[int]:
        """Blocks in the order in which they are expected, beginning after the present one; three passes
        far.
        """
        everything = list(range(self.count))
        plan = self._visits(self.kind, everything)
        present = self.seen[-1] if self.seen else None
        if present is None:
            yield from plan
        elif present in plan:
            yield from plan[plan.index(present) + 1 :]
        elif self.kind == "backward":
            yield from range(present - 1, -1, -1)
        else:
            yield from range(present + 1, self.count)
        forward = self.seen if self.kind != "backward" else self._last.get("forward", everything)
        if len(forward) < self.count and self.kind != "backward":
            forward = [*forward, *(b for b in plan if b not in forward)]
        kinds = (*self._kinds, self.kind)[-3:]
        for _ in range(3):
            kind = self._next_kind(kinds)
            yield from self._visits(kind, forward)
            kinds = (*kinds, kind)[-3:]

    def next_uses(self) -> dict[int, int]:
        """Block -> how many uses from now it is needed; blocks not foretold are missing."""
        found: dict[int, int] = {}
        for distance, block in enumerate(self.ahead()):
            found.setdefault(block, distance)
            if len(found) == self.count:
                break
        return found


class Spot(NamedTuple):
    """A place: `start` bytes into a slot."""

    slot: int
    start: int


class Ring:
    """Which block is where in the slots. All methods answer; the engine does the loading.

    sizes: bytes of the streamed blocks, in running order;  slots: how many;  slot_bytes: of each, at least the
           largest block. No block crosses from one slot into the next, so that with B slots, of which B - 1 are
           held by blocks in use, any further block finds room.
    place: block -> its spot or None
    """

    def __init__(self, sizes: Sequence[int], slots: int, slot_bytes: int) -> None:
        assert slots >= min(len(sizes), 1) and slot_bytes >= max(sizes, default=0)
        self.sizes, self.slot_bytes = sizes, slot_bytes
        self.itinerary = Itinerary(len(sizes))
        self.place: list[Spot | None] = [None] * len(sizes)
        self.within: list[list[int]] = [[] for _ in range(slots)]

    def put(self, block: int, spot: Spot) -> list[int]:
        """The block takes the spot; returns the blocks that had to leave."""
        gone = self._there(spot, self.sizes[block])
        for other in gone:
            self.place[other] = None
            self.within[spot.slot].remove(other)
        self.within[spot.slot].append(block)
        self.place[block] = spot
        return gone

    def _there(self, spot: Spot, size: int) -> list[int]:
        """Blocks that lie, wholly or in part, in the `size` bytes from the spot on."""
        found = []
        for block in self.within[spot.slot]:
            start = self._start(block)
            if start < spot.start + size and spot.start < start + self.sizes[block]:
                found.append(block)
        return found

    def _start(self, block: int) -> int:
        spot = self.place[block]
        assert spot is not None
        return spot.start

    def room(self, block: int, held: frozenset[int], uses: dict[int, int]) -> tuple[Spot, int] | None:
        """Where the block would best go, and how many uses from now the first of those that lie there is needed.

        The best spot is the one whose content is needed last; among empty ones the one in the fullest slot, so
        that large blocks find whole slots. None when blocks in use lie everywhere.
        """
        size, best, found = self.sizes[block], (-1, -1), None
        for slot, content in enumerate(self.within):
            full = sum(self.sizes[other] for other in content)
            starts = {0, self.slot_bytes - size}
            for other in content:
                starts |= {self._start(other) + self.sizes[other], self._start(other) - size}
            for start in sorted(starts):
                if not 0 <= start <= self.slot_bytes - size:
                    continue
                there = self._there(Spot(slot, start), size)
                if held.intersection(there):
                    continue
                need = min((uses.get(other, _FAR) for other in there), default=EMPTY)
                if (need, full) > best:
                    best, found = (need, full), (Spot(slot, start), need)
        return found

    def room_now(self, block: int, held: frozenset[int]) -> Spot | None:
        """Where to load a block that is needed at once; None when blocks in use lie everywhere."""
        found = self.room(block, held, self.itinerary.next_uses())
        return None if found is None else found[0]

    def prefetches(self, held: frozenset[int]) -> Iterator[tuple[int, Spot]]:
        """(block, spot) of every load worth beginning now, nearest first; the caller `put`s each before the
        next.

        The block that is needed next is always fetched ahead of its use; one further ahead only to where all
        blocks are needed later still, which is what keeps the slots of the turn from forward to backward.
        """
        uses = self.itinerary.next_uses()
        first = next(self.itinerary.ahead(), None)
        for block in sorted(uses, key=lambda b: uses[b]):
            if self.place[block] is not None:
                continue
            found = self.room(block, held, uses)
            if found is None or (block != first and found[1] <= uses[block]):
                return
            yield block, found[0]
