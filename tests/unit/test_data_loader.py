"""The order is a pure function of (seed, index); the loader hands every rank its part of it, stacked and read ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whitetuner.data.cache import Cached, build_cache
from whitetuner.data.inputs import Inputs
from whitetuner.data.loader import Loader, drops
from whitetuner.data.order import Order, Shares
from whitetuner.errors import UserError
from whitetuner.family import BuildFn, Layout, Reads
from whitetuner.records import EncodeInput, Item, Size


@dataclass(frozen=True)
class Share:
    repeats: int = 1
    weight: float | None = None
    caption_dropout: float = 0.0


def item(number: int, set_index: int = 0, shape: int = 0, caption: str = "") -> Item:
    size = Size(64, 64 + 16 * shape)
    name = f"{number:04d}"
    return Item(
        name + "-0", Path(name), name, caption or f"caption {number}", size, size, set_index=set_index
    )


def make(
    counts: list[int], sets: list[Share], batch: int = 1, shapes: int = 1, seed: int = 0
) -> tuple[list[Item], Order]:
    items = [item(100 * s + i, s, i % shapes) for s, count in enumerate(counts) for i in range(count)]
    return items, Order(items, [one.size for one in items], sets, batch, seed)


plans = st.tuples(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 1000),
)


@settings(max_examples=60)
@given(plans)
def test_an_epoch_holds_every_item_as_often_as_its_repeats(
    plan: tuple[list[int], list[int], int, int, int],
) -> None:
    counts, repeats, batch, shapes, seed = plan
    sets = [Share(repeats[i]) for i in range(len(counts))]
    batch = min(batch, sum(c * s.repeats for c, s in zip(counts, sets, strict=True)))
    items, order = make(counts, sets, batch, shapes, seed)
    visits: dict[int, list[int]] = {i: [] for i in range(len(items))}
    for epoch in range(3):
        batches = order.epoch(epoch)
        assert len(batches) == order.batches_per_epoch
        assert all(
            len({items[draw.item].size for draw in one}) == 1 and 1 <= len(one) <= batch for one in batches
        )
        count = Counter(draw.item for one in batches for draw in one)
        assert count == {i: sets[one.set_index].repeats for i, one in enumerate(items)}
        for one in batches:
            for draw in one:
                visits[draw.item].append(draw.visit)
    for i, seen in visits.items():  # never the same visit twice, none left out
        assert sorted(seen) == list(range(3 * sets[items[i].set_index].repeats))


@settings(max_examples=60)
@given(plans, st.lists(st.one_of(st.none(), st.floats(0.1, 9)), min_size=3, max_size=3))
def test_random_access_equals_walking_through(
    plan: tuple[list[int], list[int], int, int, int], weights: list[float | None]
) -> None:
    counts, repeats, batch, shapes, seed = plan
    sets = [Share(repeats[i], weights[i]) for i in range(len(counts))]
    batch = min(batch, len(counts))
    _, order = make(counts, sets, batch, shapes, seed)
    walked = [one for epoch in range(4) for one in order.epoch(epoch)]
    _, fresh = make(counts, sets, batch, shapes, seed)
    for index in reversed(range(len(walked))):
        assert fresh.batch(index) == walked[index]
    assert fresh.batches_before(4) == len(walked)


def test_the_order_hangs_on_the_seed_and_not_on_names_or_listing() -> None:
    items, order = make([6, 5], [Share(), Share(2)], batch=2, shapes=2)
    ids = [[items[draw.item].id for draw in order.batch(i)] for i in range(30)]
    turned = [replace(one, target=Path(f"renamed {i}")) for i, one in enumerate(reversed(items))]
    again = Order(turned, [one.size for one in turned], [Share(), Share(2)], 2, 0)
    assert [[turned[draw.item].id for draw in again.batch(i)] for i in range(30)] == ids
    _, other = make([6, 5], [Share(), Share(2)], batch=2, shapes=2, seed=1)
    assert [other.batch(i) for i in range(8)] != [order.batch(i) for i in range(8)]


def test_epochs_are_shuffled_anew_and_sets_are_mixed() -> None:
    items, order = make([20, 20], [Share(), Share()])
    first, second = ([draw.item for one in order.epoch(e) for draw in one] for e in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    turns = sum(items[a].set_index != items[b].set_index for a, b in pairwise(first))
    assert 10 <= turns <= 30  # 19.5 expected, deviation 3.1


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4), st.lists(st.floats(0.05, 20), min_size=4, max_size=4)
)
def test_weights_share_out_the_epoch(counts: list[int], weights: list[float]) -> None:
    sets = [Share(weight=weights[i]) for i in range(len(counts))]
    items, order = make(counts, sets)
    for epoch in (0, 5):
        drawn = Counter(items[draw.item].set_index for one in order.epoch(epoch) for draw in one)
        for number in range(len(counts)):
            exact = sum(counts) * weights[number] / sum(weights[: len(counts)])
            assert drawn[number] >= 1 and (abs(drawn[number] - exact) < 1 or drawn[number] == 1)


def test_a_weighted_small_set_is_drawn_evenly() -> None:
    items, order = make([3, 9], [Share(weight=1), Share(weight=1)])
    seen = Counter(draw.item for epoch in range(2) for one in order.epoch(epoch) for draw in one)
    assert [seen[i] for i in range(3)] == [4, 4, 4]  # 6 of 12 samples an epoch
    assert sorted(seen[i] for i in range(3, 12)) == [1] * 6 + [2] * 3
    assert all(one.set_index == (0 if i < 3 else 1) for i, one in enumerate(items))


def test_smaller_last_batches_are_kept_and_counted() -> None:
    _, order = make([7], [Share()], batch=3, shapes=2)
    assert sorted(len(one) for one in order.epoch(0)) == [1, 3, 3] and order.small_batches == 1


def test_a_batch_larger_than_an_epoch_is_refused_and_one_picture_is_enough() -> None:
    with pytest.raises(UserError, match="at most 3"):
        make([3], [Share()], batch=4)
    _, order = make([1], [Share(4)], batch=4)
    assert [draw.visit for draw in sorted(order.batch(0))] == [0, 1, 2, 3]
    _, single = make([1], [Share()])
    assert [single.batch(i) for i in range(3)] == [((0, 0),), ((0, 1),), ((0, 2),)]


# -- the loader ------------------------------------------------------------------------------------------------------


class Digits:
    """A stacked and a ragged field that name the item they are of."""

    name = "digits"
    fields: Mapping[str, Layout] = {"latent": "stack", "prompt": "ragged"}
    reads: frozenset[Reads] = frozenset({"caption"})

    def fingerprint(self) -> str:
        return "1"

    def load(self, build: BuildFn) -> None: ...

    def free(self) -> None: ...

    def encode(self, given: EncodeInput) -> dict[str, torch.Tensor]:
        number = float(given.caption.split()[-1]) if given.caption else -1.0
        return {"latent": torch.full((2, 2), number), "prompt": torch.full((len(given.caption), 1), number)}


def cached(folder: Path, items: list[Item]) -> Cached:
    return build_cache(items, [Digits()], None, folder, uncond=True)  # type: ignore[list-item, arg-type]


def test_batches_are_stacked_in_the_order_of_the_draws(tmp_path: Path) -> None:
    items, order = make([5, 4], [Share(), Share()], batch=3)
    items[1] = replace(items[1], caption="a much longer caption 1")
    with Loader(cached(tmp_path, items), items, order, [Share(), Share()]) as loader:
        for index in range(2 * order.batches_per_epoch):
            (batch,) = next(loader).mine
            draws = order.batch(index)
            assert batch.items == tuple(items[draw.item] for draw in draws)
            assert batch.visits == tuple(draw.visit for draw in draws)
            numbers = [float(one.caption.split()[-1]) for one in batch.items]
            assert batch["latent"].tolist() == [[[n, n], [n, n]] for n in numbers]  # type: ignore[union-attr]
            assert [len(text) for text in batch["prompt"]] == [len(one.caption) for one in batch.items]


@pytest.mark.parametrize("per_step", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_step_sees_the_same_samples_however_many_ranks_share_it(
    tmp_path: Path, world: int, per_step: int
) -> None:
    """None repeated, none dropped, in an order that the sizes tell; also where a step has fewer batches than ranks."""
    items, order = make([9], [Share()], batch=2)
    cache = cached(tmp_path, items)
    for start in (0, 2):
        loaders = [
            Loader(cache, items, order, [Share()], start=start, shares=Shares(per_step, rank, world))
            for rank in range(world)
        ]
        for step in range(start, start + 3):
            given = [next(loader) for loader in loaders]
            assert len({one.sizes for one in given}) == 1
            pieces = [given[number % world].mine[number // world] for number in range(len(given[0].sizes))]
            assert tuple(map(len, pieces)) == given[0].sizes
            assert sum(len(one.mine) for one in given) == len(pieces)
            seen = [
                pair
                for piece in pieces
                for pair in zip((i.id for i in piece.items), piece.visits, strict=True)
            ]
            wanted = [draw for i in range(step * per_step, (step + 1) * per_step) for draw in order.batch(i)]
            assert seen == [(items[draw.item].id, draw.visit) for draw in wanted]
        for loader in loaders:
            loader.close()


def test_dropout_empties_captions_at_its_rate_and_the_same_visits_every_time(tmp_path: Path) -> None:
    items, order = make([4, 4], [Share(), Share()], batch=4)
    sets = [Share(caption_dropout=0.3), Share()]
    cache = cached(tmp_path, items)

    def empty(start: int, count: int) -> list[tuple[str, int]]:
        found = []
        with Loader(cache, items, order, sets, start=start) as loader:
            for _ in range(count):
                (batch,) = next(loader).mine
                for one, visit, text in zip(batch.items, batch.visits, batch["prompt"], strict=True):
                    if len(text) == 0:
                        found.append((one.id, visit))
        return found

    whole = empty(0, 100)
    assert all(int(name[:4]) < 100 for name, _ in whole)  # only the first set
    assert 36 <= len(whole) <= 84  # 200 visits at 0.3: 60, deviation 6.5
    assert empty(60, 40) == whole[len(whole) - len(empty(60, 40)) :]
    assert drops(0, items[0], 0, 1.0) and not drops(0, items[0], 0, 0.0)


def test_what_breaks_while_reading_ahead_is_raised_where_the_batch_is_asked_for(tmp_path: Path) -> None:
    items, order = make([6], [Share()])
    cache = cached(tmp_path, items)
    with Loader(cache, items, order, [Share()]) as loader:
        next(loader)
        for path in tmp_path.glob("digits/*/*.safetensors"):
            path.write_bytes(b"")
        with pytest.raises(UserError, match="damaged"):
            for _ in range(6):
                next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_shape_keys_tell_what_can_share_a_batch(tmp_path: Path) -> None:
    class Wide(Digits):
        def encode(self, given: EncodeInput) -> dict[str, torch.Tensor]:
            found = super().encode(given)
            return {**found, "latent": torch.zeros(2, 3 if "wide" in given.caption else 2)}

    items = [item(1), item(2), item(3, shape=1), item(4, caption="wide 4")]
    cache = build_cache(items, [Wide()], None, tmp_path, extra=[Inputs("alone 7")])  # type: ignore[list-item, arg-type]
    keys = [cache.shape_key(one) for one in items]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    conditioned = replace(
        items[0], conditions=(Path("c"),), condition_digests=("c",), condition_sizes=(Size(32, 32),)
    )
    assert cache.shape_key(conditioned) != keys[0]
