"""Which group of blocks is loaded next, and which one makes room for it. Plain numbers, no tensors, no
device.

Blocks are used in passes: forwards in their order, backwards in the reverse. What comes next is foretold
from what came last time: a pass of a kind visits what the last one of its kind visited, and after the last
three passes comes what came after them before (so two forwards ahead of two backwards are foretold as well
as the plain pair). A wrong guess costs a wait for one load, never a wrong weight.

With B slots and S streamed groups a forward and a backward pass load 2 (S - B) groups, which is the least
possible: each pass touches all of them and begins with at most B of them there (reference: Belady 1966,
          evict what is needed last).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Literal

Kind = Literal["forward", "backward", "sampling"]
_FAR = 1 << 30


class Itinerary:
    """Foretells the uses of `count` groups from the uses seen so far."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kind: Kind = "forward"
        self.seen: list[int] = []
        self._last: dict[Kind, list[int]] = {}
        self._after: dict[tuple[Kind, ...], Kind] = {}
        self._kinds: tuple[Kind, ...] = ()

    def use(self, group: int, kind: Kind) -> None:
        """Notes that a group is used now, in a pass of this kind."""
        if self.seen and self.seen[-1] == group and kind == self.kind:
            return
        if kind != self.kind or group in self.seen:
            self._close()
            self.kind = kind
        self.seen.append(group)

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
        """Groups in the order in which they are expected, beginning after the present one; three passes
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
            forward = [*forward, *(g for g in plan if g not in forward)]
        kinds = (*self._kinds, self.kind)[-3:]
        for _ in range(3):
            kind = self._next_kind(kinds)
            yield from self._visits(kind, forward)
            kinds = (*kinds, kind)[-3:]

    def next_uses(self) -> dict[int, int]:
        """Group -> how many uses from now it is needed; groups not foretold are missing."""
        found: dict[int, int] = {}
        for distance, group in enumerate(self.ahead()):
            found.setdefault(group, distance)
            if len(found) == self.count:
                break
        return found


class Ring:
    """Which group is in which of the slots. All methods answer; the engine does the loading.

    holder: slot -> group or None;  place: group -> slot or None
    """

    def __init__(self, count: int, slots: int) -> None:
        assert slots >= min(count, 2), "a ring needs two slots: one to compute from, one to load into"
        self.itinerary = Itinerary(count)
        self.holder: list[int | None] = [None] * min(slots, count)
        self.place: list[int | None] = [None] * count

    def put(self, group: int, slot: int) -> int | None:
        """The group takes the slot; returns the group that had to leave."""
        old = self.holder[slot]
        if old is not None:
            self.place[old] = None
        self.holder[slot], self.place[group] = group, slot
        return old

    def empty(self) -> None:
        """Nobody is anywhere."""
        self.holder = [None] * len(self.holder)
        self.place = [None] * len(self.place)

    def room_now(self, held: frozenset[int]) -> int | None:
        """The slot to load into when a group is needed at once: an empty one, else the one needed last, not
        held.
        """
        uses = self.itinerary.next_uses()
        free = [s for s, group in enumerate(self.holder) if group is None or group not in held]
        if not free:
            return None
        return max(free, key=lambda s: self._need(s, uses))

    def prefetches(self, held: frozenset[int]) -> Iterator[tuple[int, int]]:
        """(group, slot) of every load worth beginning now, nearest first; the caller `put`s each before the
        next.

        The group that is needed next is always fetched ahead of its use; one further ahead only into a slot
        whose group is needed later still, which is what keeps the slots of the turn from forward to backward.
        """
        uses = self.itinerary.next_uses()
        first = next(iter(islice(self.itinerary.ahead(), 1)), None)
        for group in sorted(uses, key=lambda g: uses[g]):
            if self.place[group] is not None:
                continue
            free = [s for s, other in enumerate(self.holder) if other is None or other not in held]
            if not free:
                return
            slot = max(free, key=lambda s: self._need(s, uses))
            if group != first and self._need(slot, uses) <= uses[group]:
                return
            yield group, slot

    def _need(self, slot: int, uses: dict[int, int]) -> int:
        group = self.holder[slot]
        return _FAR + 1 if group is None else uses.get(group, _FAR)
