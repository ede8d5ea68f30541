"""In which order items are visited: a pure function of (seed, index), so that resume, workers and ranks cannot change it.

Every set has its own endless row of shuffled passes; an epoch takes the next so many of each row. The visit number of an
item is how often it was drawn before: its pass. Draws of an epoch are shuffled, put into micro-batches of one shape, and
the micro-batches shuffled again. Only Python's `random.Random(int).random()` is used, whose numbers are guaranteed not to
change between versions; nothing hangs on file names.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from whitetuner.errors import UserError
from whitetuner.records import Item


class SetShare(Protocol):
    """repeats: visits of each item in an epoch; weight: share of the epoch's draws relative to other sets, instead."""

    @property
    def repeats(self) -> int: ...

    @property
    def weight(self) -> float | None: ...


class Draw(NamedTuple):
    """item: index into the items; visit: how often it was drawn before."""

    item: int
    visit: int


MicroBatch = tuple[Draw, ...]


class Portion(NamedTuple):
    """What a rank takes of a step. mine: its micro-batches; sizes: samples of all the step's micro-batches, in their order,
    of which rank r of W has number r, r + W, ..."""

    mine: tuple[MicroBatch, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Shares:
    """How ranks share out a step. per_step: micro-batches of it, over all ranks; a run keeps it, however many ranks go on."""

    per_step: int = 1
    rank: int = 0
    world: int = 1

    def portion(self, order: Order, step: int) -> Portion:
        """Of the optimizer step after `step` steps.

        Step s sees the micro-batches s k up to (s + 1) k - 1, k = per_step, whoever computes them: rank r has every W-th from
        r on. With more ranks than micro-batches each of these is cut in W // k pieces; a rank may have nothing then.
        """
        whole = [order.batch(step * self.per_step + number) for number in range(self.per_step)]
        parts = max(1, self.world // self.per_step)
        pieces = [piece for batch in whole for piece in _cut(batch, parts)]
        return Portion(tuple(pieces[self.rank :: self.world]), tuple(map(len, pieces)))


#: A step of one micro-batch, for one process.
ALL = Shares()


def _cut(batch: MicroBatch, parts: int) -> list[MicroBatch]:
    """In so many pieces of sizes as equal as can be, fewer when there are fewer samples; the samples stay in order."""
    parts = min(parts, len(batch))
    ends = [len(batch) * number // parts for number in range(parts + 1)]
    return [batch[start:end] for start, end in itertools.pairwise(ends)]


class Order:
    """An endless sequence of micro-batches; `Shares` says which of them a step and a rank have."""

    def __init__(
        self,
        items: Sequence[Item],
        shape_keys: Sequence[Hashable],
        sets: Sequence[SetShare],
        batch_size: int,
        seed: int,
    ) -> None:
        """shape_keys: one for each item; items in one micro-batch have equal ones. Sets that no item is of are passed over.

        With any weight given, an epoch keeps its length (sum of items x repeats) and is shared out by weight (a set without
        counts 1; the largest remainders are rounded up; every set gets at least one draw).
        Raises UserError when a batch would be larger than an epoch.
        """
        assert len(items) == len(shape_keys) and items, "one shape key for each of at least one item"
        self.seed, self.batch_size = seed, batch_size
        self._shape_keys = list(shape_keys)
        ids = [item.id for item in items]
        self._rows = [
            sorted((i for i, item in enumerate(items) if item.set_index == number), key=lambda i: ids[i])
            for number in range(len(sets))
        ]
        self._draws = _draws([len(row) for row in self._rows], sets)
        self.samples_per_epoch = sum(self._draws)
        if batch_size > self.samples_per_epoch:
            raise UserError(
                "batch_size = {batch} is more than the {samples} samples of a whole epoch",
                where="data.batch_size",
                mend="set data.batch_size to at most {samples}, or raise repeats of the sets",
                batch=batch_size,
                samples=self.samples_per_epoch,
            )
        whole_passes = all(
            not row or draws % len(row) == 0 for row, draws in zip(self._rows, self._draws, strict=True)
        )
        self._constant = whole_passes or batch_size == 1  # every epoch has as many micro-batches as the first
        self._ends: list[int] = []
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._pass = lru_cache(maxsize=4 * len(sets))(self._make_pass)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of the first epoch; later ones differ only where sets have weights and batches are mixed of shapes."""
        return len(self._epoch(0))

    @property
    def small_batches(self) -> int:
        """Micro-batches of the first epoch with fewer than batch_size samples: a shape's items do not divide evenly."""
        return sum(len(batch) < self.batch_size for batch in self._epoch(0))

    def batch(self, index: int) -> MicroBatch:
        """Micro-batch number `index` of the run, counted from 0."""
        epoch = self.epoch_of(index)
        return self._epoch(epoch)[index - self.batches_before(epoch)]

    def epoch_of(self, index: int) -> int:
        """The epoch, counted from 0, that a micro-batch is of."""
        if self._constant:
            return index // self.batches_per_epoch
        while not self._ends or self._ends[-1] <= index:
            self._extend()
        return bisect_right(self._ends, index)

    def batches_before(self, epoch: int) -> int:
        """Number of micro-batches in all epochs before."""
        if self._constant:
            return epoch * self.batches_per_epoch
        while len(self._ends) < epoch:
            self._extend()
        return self._ends[epoch - 1] if epoch else 0

    def epoch(self, number: int) -> tuple[MicroBatch, ...]:
        """All micro-batches of an epoch."""
        return self._epoch(number)

    def _extend(self) -> None:
        epoch = len(self._ends)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(self._epoch(epoch)))

    def _make_epoch(self, epoch: int) -> tuple[MicroBatch, ...]:
        draws = []
        for number, (row, count) in enumerate(zip(self._rows, self._draws, strict=True)):
            for position in range(epoch * count, (epoch + 1) * count):
                visit, place = divmod(position, len(row))
                draws.append(Draw(self._pass(number, visit)[place], visit))
        open_batches: dict[Hashable, list[Draw]] = {}
        done: list[MicroBatch] = []
        for draw in _shuffled(draws, self.seed, "mix", epoch):
            batch = open_batches.setdefault(self._shape_keys[draw.item], [])
            batch.append(draw)
            if len(batch) == self.batch_size:
                done.append(tuple(batch))
                batch.clear()
        done += [tuple(batch) for batch in open_batches.values() if batch]
        return tuple(_shuffled(done, self.seed, "batches", epoch))

    def _make_pass(self, number: int, visit: int) -> list[int]:
        return _shuffled(self._rows[number], self.seed, f"set {number}", visit)


def _draws(counts: Sequence[int], sets: Sequence[SetShare]) -> list[int]:
    """How many samples of each set an epoch has."""
    plain = [count * one.repeats for count, one in zip(counts, sets, strict=True)]
    if all(one.weight is None for one in sets):
        return plain
    weights = [
        (1.0 if one.weight is None else one.weight) if count else 0.0
        for count, one in zip(counts, sets, strict=True)
    ]
    total = sum(plain)
    exact = [total * weight / sum(weights) for weight in weights]
    draws = [int(share) for share in exact]
    by_remainder = sorted(range(len(sets)), key=lambda number: (draws[number] - exact[number], number))
    for number in by_remainder[: total - sum(draws)]:
        draws[number] += 1
    return [max(1, share) if count else 0 for share, count in zip(draws, counts, strict=True)]


def _shuffled(values: Sequence, seed: int, purpose: str, number: int) -> list:
    digest = hashlib.blake2b(f"{seed}\0order\0{purpose}\0{number}".encode(), digest_size=16).digest()
    source = random.Random(int.from_bytes(digest, "little"))
    keys = [source.random() for _ in values]
    return [values[place] for place in sorted(range(len(values)), key=keys.__getitem__)]
