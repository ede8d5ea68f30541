"""Batches for one rank, read from the cache by a thread that stays a little ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from whitetuner.data.cache import Cached
from whitetuner.data.mask_fields import all_counts
from whitetuner.data.order import ALL, MicroBatch, Order, Shares
from whitetuner.diffusion.sigmas import generator_for
from whitetuner.records import Batch, Item, Sample, StepBatches

__all__ = ["Loader", "Order", "stack"]

#: Encoded samples that stay in host memory: enough for small sets, little beside a model.
KEPT_BYTES = 256 * 2**20


class Dropping(Protocol):
    """caption_dropout: chance, 0..1, that a visit is made with an empty caption."""

    @property
    def caption_dropout(self) -> float: ...


class Loader(Iterator[StepBatches]):
    """Endless: what this rank has of one optimizer step after the other.

    start: optimizer steps done before; shares: what of each step this rank has
    ahead: micro-batches that are read while others are learned from, at least 1
    """

    def __init__(
        self,
        cached: Cached,
        items: Sequence[Item],
        order: Order,
        sets: Sequence[Dropping],
        *,
        start: int = 0,
        shares: Shares = ALL,
        ahead: int = 3,
    ) -> None:
        self._cached, self._items, self._order, self._sets = cached, items, order, sets
        self._next, self._shares, self._most_ahead = start, shares, ahead
        self._kept: dict[tuple[int, int, bool, int], Mapping[str, torch.Tensor]] = {}
        self._kept_bytes = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: deque[tuple[list[Future[Batch]], tuple[int, ...]]] = deque()
        self._read_ahead()

    def __next__(self) -> StepBatches:
        """Raises what the reading thread met (UserError for a damaged cache entry); StopIteration after `close`."""
        if not self._ahead:
            raise StopIteration
        futures, sizes = self._ahead.popleft()
        self._read_ahead()
        return StepBatches([future.result() for future in futures], sizes)

    def close(self) -> None:
        """Ends the reading thread; no batch comes after it."""
        self._ahead.clear()
        self._reader.shutdown(cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        """At least one step; more while they are of few micro-batches."""
        while not self._ahead or sum(max(1, len(futures)) for futures, _ in self._ahead) < self._most_ahead:
            portion = self._shares.portion(self._order, self._next)
            self._next += 1
            futures = [self._reader.submit(self.read, draws) for draws in portion.mine]
            self._ahead.append((futures, portion.sizes))

    def read(self, draws: MicroBatch) -> Batch:
        """One micro-batch, its dropped and shuffled captions decided by (seed, item, visit)."""
        samples = []
        for number, visit in draws:
            item = self._items[number]
            uncond = drops(self._order.seed, item, visit, self._sets[item.set_index].caption_dropout)
            order = 0 if uncond else chosen_order(self._order.seed, item, visit)
            samples.append(Sample(item, visit, self._fields(number, visit, uncond, order)))
        return stack(samples, self._cached)

    def _fields(self, number: int, visit: int, uncond: bool, order: int) -> Mapping[str, torch.Tensor]:
        """What the encoders said, from the disk or, while there is room, from memory: a small set is read once."""
        item = self._items[number]
        clip = visit % max(1, len(item.clips))
        kept = self._kept.get((number, clip, uncond, order))
        if kept is not None:
            return kept
        fields = self._cached.sample(item, clip, uncond=uncond, order=order).fields
        size = sum(tensor.numel() * tensor.element_size() for tensor in fields.values())
        if self._kept_bytes + size <= KEPT_BYTES:
            self._kept[number, clip, uncond, order] = fields
            self._kept_bytes += size
        return fields


def drops(seed: int, item: Item, visit: int, chance: float) -> bool:
    """Whether this visit is made without text."""
    if chance <= 0:
        return False
    return torch.rand((), generator=generator_for(seed, item.id, visit, "caption_dropout")).item() < chance


def chosen_order(seed: int, item: Item, visit: int) -> int:
    """In which order this visit has the caption's tags: 0 as written, n: item.orders[n - 1], all of them equally often."""
    if not item.orders:
        return 0
    generator = generator_for(seed, item.id, visit, "caption_order")
    return int(torch.randint(1 + len(item.orders), (), generator=generator))


def stack(samples: Sequence[Sample], cached: Cached) -> Batch:
    """Samples of one shape key side by side: stacked fields (B, ...), ragged ones as lists.

    Beside a sample with a mask, one without counts as a whole.
    """
    fields: dict[str, torch.Tensor | list[torch.Tensor]] = {}
    given = [sample.fields for sample in samples]
    if any("mask" in one for one in given):
        given = [{"mask": all_counts(one["latent"]), **one} for one in given]
    for name in given[0]:
        values = [one[name] for one in given]
        fields[name] = torch.stack(values) if cached.layouts[name] == "stack" else values
    return Batch(tuple(sample.item for sample in samples), tuple(sample.visit for sample in samples), fields)
