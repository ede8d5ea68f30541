"""The schedule in numbers alone: no order of loading whole blocks is faster, by trying all of them on small lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
import torch

from whitetuner.memory.swap.backend import CpuBackend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.layout import slot_bytes, spread
from whitetuner.memory.swap.schedule import EMPTY, Ring

Uses = list[tuple[int, float]]


def step_uses(sizes: Sequence[int], backward: float, steps: int) -> Uses:
    """(block, seconds) of `steps` forward and backward passes; a forward takes as long as the block is large."""
    forward = [(i, float(size)) for i, size in enumerate(sizes)]
    return steps * (forward + [(i, seconds * backward) for i, seconds in reversed(forward)])


def timed(sizes: Sequence[int], streamed: Sequence[int], slots: int, load: float, uses: Uses) -> float:
    """Seconds that the engine's schedule takes, with `load` seconds of the link for each unit of size."""
    turns = [sizes[i] for i in streamed]
    ring = Ring(turns, slots, slot_bytes(turns) if max(turns) > 256 else max(turns))
    ready: dict[int, float] = {}
    now = link = 0.0

    def put(number: int, spot: object, since: float) -> None:
        nonlocal link
        ring.put(number, spot)  # type: ignore[arg-type]
        link = max(link, since) + turns[number] * load
        ready[number] = link

    for number in range(len(turns)):
        found = ring.room(number, frozenset(), {})
        if found is None or found[1] != EMPTY:
            break
        ring.put(number, found[0])
        ready[number] = 0.0
    half = len(sizes)
    for at, (block, seconds) in enumerate(uses):
        if block not in streamed:
            now += seconds
            continue
        number = streamed.index(block)
        ring.itinerary.use(number, "forward" if at // half % 2 == 0 else "backward")
        assert ring.place[number] is not None, "a load began only when its block was needed"
        for other, spot in ring.prefetches(frozenset([number])):
            put(other, spot, now)
        now = max(now, ready[number]) + seconds
        for other, spot in ring.prefetches(frozenset()):
            put(other, spot, now)
    return now


State = tuple[float, float, tuple[tuple[int, float], ...]]


def fastest(sizes: Sequence[int], streamed: Sequence[int], room: int, load: float, uses: Uses) -> float:
    """Seconds of the best of all schedules: any load into any `room` units of memory at any end of a block, any
    block given up for it."""

    def loads(state: State, new: frozenset[int] = frozenset()) -> Iterator[State]:
        now, link, there = state
        yield state
        present = dict(there)
        for block in streamed:
            if block in present:
                continue
            old = [b for b in present if b not in new]
            for count in range(min(len(old), 2) + 1):
                for gone in combinations(old, count):
                    kept = {b: t for b, t in present.items() if b not in gone}
                    if sum(sizes[b] for b in kept) + sizes[block] <= room:
                        end = max(link, now) + sizes[block] * load
                        after = (now, end, tuple(sorted((*kept.items(), (block, end)))))
                        yield from loads(after, new | {block})

    first, used = {}, 0
    for block in streamed:
        if used + sizes[block] > room:
            break
        first[block], used = 0.0, used + sizes[block]
    states = {(0.0, 0.0, tuple(sorted(first.items())))}
    for block, seconds in uses:
        after = set()
        for now, link, there in states:
            ready = dict(there).get(block, None if block in streamed else 0.0)
            if ready is not None:
                after |= set(loads((max(now, ready) + seconds, link, there)))
        states = undominated(after)
    return min(now for now, _, _ in states)


def undominated(states: set[State]) -> set[State]:
    """Without those that another one equals in content and beats in all times."""
    by_content: dict[tuple[int, ...], list[State]] = {}
    for state in sorted(states):
        others = by_content.setdefault(tuple(block for block, _ in state[2]), [])
        times = (state[0], state[1], *(t for _, t in state[2]))
        if not any(
            all(a <= b for a, b in zip((o[0], o[1], *(t for _, t in o[2])), times, strict=True))
            for o in others
        ):
            others.append(state)
    return {state for others in by_content.values() for state in others}


@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize("load", [0.5, 1.5, 2.5])
@pytest.mark.parametrize(
    ("sizes", "within"),
    # Where a large block follows small ones, room that is free in two slots is not one place: at most
    # 5 % on this short list.
    [((1, 1, 1, 1, 1), 1.0), ((2, 1, 1, 1), 1.05)],
)
def test_no_order_of_loads_is_faster(
    sizes: tuple[int, ...], within: float, load: float, backward: float
) -> None:
    uses = step_uses(sizes, backward, 1)
    uses += uses[: len(sizes)]
    streamed = range(len(sizes))
    ours = timed(sizes, streamed, 2, load, uses)
    best = fastest(sizes, streamed, 2 * max(sizes), load, uses)
    assert best * 0.999999 <= ours <= best * within * 1.000001


@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize(
    "sizes", [(1,) * 60, (1,) * 40, (1,) * 34, (2,) * 5 + (1,) * 20, (2,) * 8 + (1,) * 24]
)
def test_real_lists_take_the_time_of_the_bound_with_the_turns(
    sizes: tuple[int, ...], backward: float
) -> None:
    """max(T, E + V/B) of either pass, E: the outermost blocks, during which memory is full of what comes next."""
    total, outer = sum(sizes), sizes[0] + sizes[-1]
    for budget in (3 * max(sizes), total // 4, total // 2):
        residents = spread(sizes, budget - 3 * max(sizes))
        streamed = [i for i in range(len(sizes)) if i not in residents]
        for load in (1.0, 1.25, 2.0):
            one, more = (timed(sizes, streamed, 3, load, step_uses(sizes, backward, n)) for n in (1, 3))
            link = (total - budget) * load
            bound = max(total, link + outer) + max(total * backward, link + outer * backward)
            assert (more - one) / 2 <= 1.01 * bound, (budget, load)


def fewest_loads(passes: Sequence[Sequence[int]], slots: int, repeats: int = 20) -> float:
    """Loads of a round of passes in the long run when what is needed last makes room (Belady 1966), nothing fetched ahead."""
    uses = [block for _ in range(repeats) for one in passes for block in one]
    after, seen = [0] * len(uses), {}
    for at in reversed(range(len(uses))):
        after[at] = seen.get(uses[at], len(uses) + uses[at])
        seen[uses[at]] = at
    there: dict[int, int] = {}
    counted, warm = 0, len(uses) // 2
    for at, block in enumerate(uses):
        if block not in there:
            counted += at >= warm
            if len(there) == slots:
                del there[max(there, key=lambda one: there[one])]
        there[block] = after[at]
    return counted / (repeats / 2)


@pytest.mark.parametrize("apart", [0, 1, 2])
@pytest.mark.parametrize(("blocks", "residents", "slots"), [(30, 0, 2), (30, 0, 3), (30, 20, 3)])
def test_a_forward_more_in_a_step_loads_each_streamed_block_once_more(
    blocks: int, residents: int, slots: int, apart: int
) -> None:
    """Given pictures of GLM-Image go through the model before the target: B loads a pass above the least, none late.

    The least is had by holding blocks over a whole pass and taking the others through one slot, between which and the next use
    nothing could be fetched ahead: computing and loading would take turns.
    """
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(blocks))).requires_grad_(
        False
    )
    holder = torch.nn.ModuleDict({"blocks": module})
    engine = SwapEngine(holder, ("blocks",), residents, CpuBackend(0), slots=slots, smallest_bytes=0).attach()
    x = torch.ones(1, 4, requires_grad=True)
    for _ in range(4):
        for _ in range(apart):
            with torch.no_grad():
                module(x)
        module(x).sum().backward()
        counters = engine.step_end()
    streamed = blocks - residents
    forward = list(range(streamed))
    least = fewest_loads([forward] * (1 + apart) + [forward[::-1]], slots)
    assert counters.demanded == 0
    assert counters.loads == 2 * (streamed - slots) + apart * streamed
    assert least <= counters.loads <= least + apart * slots
