"""A swapped module answers like a plain one: state, loading, moving, resizing, errors in the middle."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from swap_standins import LISTS, Net, Setup, build, inputs
from torch import nn

from whitetuner.memory.swap.backend import CpuBackend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.layout import ALIGN, layouts_of, slot_bytes, spread, spread_count, units
from whitetuner.memory.swap.schedule import Ring


def swapped(residents: int = 2, **setup: object) -> tuple[Net, SwapEngine]:
    net = build(Setup(**setup))  # type: ignore[arg-type]
    return net, SwapEngine(net, LISTS, residents, CpuBackend(4), smallest_bytes=0).attach()


def output(net: Net, step: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return net(*inputs(step))


def gradients(net: Net, step: int = 0) -> list[torch.Tensor]:
    net.zero_grad()
    net(*inputs(step)).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_state_is_read_as_if_all_blocks_were_there() -> None:
    net, _ = swapped()
    plain = build(Setup()).state_dict()
    assert list(net.state_dict()) == list(plain)
    assert all(torch.equal(t, plain[n]) for n, t in net.state_dict().items())
    gradients(net)
    assert all(torch.equal(t, plain[n]) for n, t in net.state_dict().items() if ".a" not in n)
    single = net.singles[3].state_dict()
    assert all(torch.equal(t, plain[f"singles.3.{n}"]) for n, t in single.items())


def test_state_is_loaded_into_blocks_wherever_they_are() -> None:
    torch.manual_seed(9)
    other = Net()
    net, _ = swapped()
    output(net)
    net.load_state_dict(other.state_dict())
    assert torch.equal(output(net), output(other))
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in net.state_dict().items())


def test_moving_the_module_leaves_swapped_weights_where_they_are() -> None:
    net, engine = swapped()
    wanted = output(build(Setup()))
    pointers = [entry.tensor.data_ptr() for layout in engine.layouts for entry in layout.entries]
    net.to("cpu").requires_grad_(True).float()
    assert pointers == [entry.tensor.data_ptr() for layout in engine.layouts for entry in layout.entries]
    assert torch.equal(output(net), wanted)
    with pytest.raises(RuntimeError, match="detach"):
        net.to(torch.bfloat16)


def test_detached_it_is_the_plain_module_again() -> None:
    net, engine = swapped()
    wanted = build(Setup())
    assert same(gradients(net), gradients(wanted))
    engine.detach()
    assert not engine.attached
    assert all("forward" not in m.__dict__ and "_apply" not in m.__dict__ for m in net.modules())
    assert all(torch.equal(t, wanted.state_dict()[n]) for n, t in net.state_dict().items())
    assert same(gradients(net), gradients(wanted))
    net.to(torch.float64)
    again = SwapEngine(net.float(), LISTS, 0, CpuBackend(), smallest_bytes=0).attach()
    assert same(gradients(net), gradients(wanted)) and again.attached


def test_evicted_blocks_come_back_with_the_next_forward() -> None:
    net, engine = swapped()
    wanted = build(Setup())
    gradients(net)
    engine.evict()
    assert torch.equal(net.singles[2].up.weight, wanted.singles[2].up.weight)
    assert same(gradients(net, 1), gradients(wanted, 1))


@pytest.mark.parametrize("recompute", [None, "all"])
def test_residents_change_between_steps(recompute: str | None) -> None:
    net, engine = swapped(2, recompute=recompute)
    wanted = build(Setup(recompute=recompute))
    held = []
    for step, (residents, slots) in enumerate([(0, 2), (6, 2), (3, 3), (frozenset({0, 5}), 2), (1, 4)]):
        engine.resize(residents, slots)
        assert same(gradients(net, step), gradients(wanted, step))
        held.append(engine.placement.device_bytes)
    assert held[0] < held[1] and held[3] < held[1]


def test_a_resize_between_forward_and_backward() -> None:
    for before, after in ((0, 4), (4, 0), (2, 3)):
        net, engine = swapped(before)
        wanted = build(Setup())
        loss = net(*inputs(0)).square().mean()
        engine.resize(after)
        loss.backward()
        assert same([p.grad for p in net.parameters() if p.grad is not None], gradients(wanted))


class Stops(torch.autograd.Function):
    """Raises in the backward pass when asked."""

    armed = False

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        if Stops.armed:
            raise RuntimeError("stopped in the middle")
        return grad


@pytest.mark.parametrize("style", ["with_keywords", "outer_checkpoint", "reentrant_checkpoint"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_exception_the_next_step_is_right(style: str, where: str) -> None:
    net, _ = swapped(1, style=style)
    wanted = gradients(build(Setup(style=style)), 1)
    middle = net.singles[1].down

    def hook(_: nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
        if where == "forward" and Stops.armed:
            raise RuntimeError("stopped in the middle")
        return Stops.apply(out)

    handle = middle.register_forward_hook(hook)
    for _ in range(2):
        Stops.armed = True
        with pytest.raises(RuntimeError, match="middle"):
            gradients(net, 0)
        Stops.armed = False
        assert same(gradients(net, 1), wanted)
    handle.remove()


def test_weights_are_read_outside_of_a_forward() -> None:
    net, engine = swapped(0)
    plain = build(Setup())
    for index in (0, 3, 1, 2):
        with engine.weights_of(net.singles[index]):
            assert torch.equal(net.singles[index].up.weight, plain.singles[index].up.weight)
    assert same(gradients(net), gradients(plain))


def test_adapters_and_norms_stay_and_large_frozen_weights_move() -> None:
    block = nn.ModuleDict({"big": nn.Linear(256, 256), "norm": nn.LayerNorm(256)}).requires_grad_(False)
    block["adapter"] = nn.Linear(256, 256)
    block.register_buffer("table", torch.zeros(300, 256))
    (layout,) = layouts_of([("b.0", block)])
    assert {id(e.tensor) for e in layout.entries} == {id(block["big"].weight), id(block.table)}
    assert all(e.offset % ALIGN == 0 for e in layout.entries)


def test_a_weight_that_two_blocks_share_stays() -> None:
    a, b = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8).requires_grad_(False)
    b.weight = a.weight
    layouts = layouts_of([("0", a), ("1", b)], 0)
    assert [len(layout.entries) for layout in layouts] == [1, 1]


def test_residents_are_spread_by_bytes() -> None:
    for count in (6, 25, 60):
        for residents in range(count + 1):
            kept = spread_count(count, residents)
            away = sorted(set(range(count)) - kept)
            assert len(kept) == residents
            gaps = [b - a for a, b in pairwise(away)]
            assert not gaps or max(gaps) - min(gaps) <= 1
    sizes = [491] * 5 + [245] * 20
    for budget in (0, 300, 2000, 5000, 10**6):
        kept = spread(sizes, budget)
        assert sum(sizes[i] for i in kept) <= budget
        assert budget - sum(sizes[i] for i in kept) < 491 or len(kept) == 25


def test_two_half_blocks_share_a_slot() -> None:
    sizes = [512 * 2] * 2 + [512] * 5
    assert units(sizes, range(7)) == [(0,), (1,), (2, 3), (4, 5), (6,)]
    assert units(sizes, [2, 4, 6]) == [(2,), (4,), (6,)]
    assert units(sizes, []) == []


def test_blocks_a_little_larger_than_half_share_a_slot_too() -> None:
    """Klein 4B in int8: a single block with its scales is 36 KB more than half a double block."""
    double, single = 245_514_240, 122_793_984
    sizes = [double] * 5 + [single] * 20
    assert slot_bytes(sizes) == 2 * single
    assert units(sizes, range(25))[5:] == [(i, i + 1) for i in range(5, 25, 2)]
    assert slot_bytes([1000 * ALIGN, 600 * ALIGN]) == 1000 * ALIGN and slot_bytes([]) == 0
    ring = Ring(sizes, 2, slot_bytes(sizes))
    for number in (5, 6, 7, 8):
        spot = ring.room_now(number, frozenset())
        assert spot is not None and ring.put(number, spot) == []
    spot = ring.room_now(0, frozenset([5]))
    assert spot is not None and sorted(ring.put(0, spot)) == [7, 8]
    assert ring.room_now(1, frozenset([0, 6])) is None


@pytest.mark.parametrize(
    ("residents", "slots", "told"),
    [(7, 2, "7 resident blocks of 6"), (-1, 2, "-1"), ({9}, 2, "of 6"), (2, 1, "two slots")],
)
def test_impossible_choices_are_told(residents: object, slots: int, told: str) -> None:
    net = build(Setup())
    with pytest.raises(ValueError, match=told):
        SwapEngine(net, LISTS, residents, CpuBackend(), slots=slots)  # type: ignore[arg-type]
    engine = SwapEngine(net, LISTS, 2, CpuBackend(), smallest_bytes=0).attach()
    with pytest.raises(ValueError, match=told):
        engine.resize(residents, slots)  # type: ignore[arg-type]
    assert same(gradients(net), gradients(build(Setup())))
