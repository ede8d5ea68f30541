"""E5: block swap on equals off, to the bit, for every way a block is called; loads at the bound, nothing
copied back.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from swap_standins import LISTS, Block, Net, Result, Setup, build, inputs, train

from whitetuner.memory.blocks import blocks_of
from whitetuner.memory.swap.backend import CpuBackend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.layout import layouts_of


@cache
def plain(
    style: str = "with_keywords",
    recompute: str | tuple[int, ...] | None = None,
    temb_trains: bool = True,
    input_trains: bool = True,
    pairs: int = 2,
    quantize: str | None = None,
) -> Result:
    setup = Setup(style, recompute, temb_trains, input_trains, pairs=pairs, quantize=quantize)  # type: ignore[arg-type]
    return train(setup, None)


WAYS = [
    ("with_keywords", None),
    ("with_positions", None),
    ("with_keywords", "all"),
    ("with_keywords", (0, 3, 5)),
    ("outer_checkpoint", None),
    ("reentrant_checkpoint", None),
]


@pytest.mark.parametrize(
    ("style", "recompute", "temb_trains", "input_trains"),
    [
        (*way, temb, given)
        for way in WAYS
        for temb in (True, False)
        for given in (True, False)
        # Reentrant checkpoints give no gradient when no input of the first block has one (torch).
        if temb or given or way[0] != "reentrant_checkpoint"
    ],
)
def test_three_steps_are_equal_to_the_bit_at_every_residency(
    style: str, recompute: str | tuple[int, ...] | None, temb_trains: bool, input_trains: bool
) -> None:
    setup = Setup(style, recompute, temb_trains, input_trains)
    wanted = plain(style, recompute, temb_trains, input_trains)
    for residents in range(7):
        for seed in (None, residents):
            result = train(setup, residents, CpuBackend(seed))
            assert result.same_bits(wanted), (residents, seed)
            assert all(c.copies_back == 0 for c in result.counters)
    assert wanted.gradients.keys() >= {"singles.0.a", "pairs.0.image.b"}


@pytest.mark.parametrize(("style", "recompute"), WAYS)
def test_loads_are_at_the_bound(style: str, recompute: str | tuple[int, ...] | None) -> None:
    """Equal blocks: 2 (N - R) loads a step, R = residents + slots; the first step may not know the second
    pass yet.
    """
    setup = Setup(style, recompute, pairs=0, singles=9, steps=4)
    for residents in range(8):
        for slots in (2, 3):
            result = train(Setup(**{**setup.__dict__, "slots": slots}), residents)
            bound = 2 * max(0, 9 - residents - slots)
            assert [c.loads for c in result.counters[1:]] == [bound] * 3, (residents, slots)
            assert [c.demanded for c in result.counters[1:]] == [0] * 3


def test_unequal_blocks_load_at_the_bound_of_bytes() -> None:
    """Two single blocks lie where one pair does, each with a turn of its own: a pass loads all but two slots' bytes."""
    for recompute in ("all", None):
        setup = Setup(recompute=recompute, pairs=3, singles=7, steps=5)
        sizes = [layout.num_bytes for layout in layouts_of(blocks_of(build(setup), LISTS), 0)]
        assert sizes[0] == 2 * sizes[-1]
        for slots in (2, 3):
            result = train(Setup(**{**setup.__dict__, "slots": slots}), 0)
            bound = 2 * (sum(sizes) - slots * sizes[0])
            assert [c.bytes_up for c in result.counters[2:]] == [bound] * 3
            assert [c.demanded for c in result.counters[1:]] == [0] * 4


def test_blocks_of_odd_sizes_are_equal_and_never_demanded() -> None:
    """Sizes that fill no slot evenly: the bits stay, and every load begins ahead of its use."""

    def net(style: str) -> Net:
        made = build(Setup(style, pairs=1, singles=7))
        torch.manual_seed(3)
        for number, hidden in enumerate((24, 40, 8, 30, 24, 12, 44)):
            made.singles[number] = Block(hidden)
        return made

    for style in ("with_keywords", "outer_checkpoint"):
        for residents in range(7):
            wanted, ours = net(style), net(style)
            engine = SwapEngine(ours, LISTS, residents, CpuBackend(residents), smallest_bytes=0).attach()
            for step in range(4):
                for one in (wanted, ours):
                    one.zero_grad()
                    one(*inputs(step)).square().mean().backward()
                counted = engine.step_end()
                gradients = {n: p.grad for n, p in wanted.named_parameters() if p.grad is not None}
                assert all(torch.equal(ours.get_parameter(n).grad, g) for n, g in gradients.items())
                assert counted.copies_back == 0 and (step == 0 or counted.demanded == 0)


@pytest.mark.parametrize("recompute", [None, "all", (1, 4)])
def test_blocks_run_exactly_as_often_as_chosen(recompute: str | tuple[int, ...] | None) -> None:
    which = recompute if recompute is not None else "none"
    chosen = range(6) if which == "all" else which if which != "none" else ()
    result = train(Setup(recompute=which), 1)
    assert result.runs == [2 if i in chosen else 1 for i in range(6)]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("recompute", [None, "all"])
def test_quantised_blocks_travel_quantised(kind: str, recompute: str | None) -> None:
    setup = Setup(recompute=recompute, quantize=kind)  # type: ignore[arg-type]
    wanted = plain(recompute=recompute, quantize=kind)
    dense = train(Setup(recompute=recompute), 0).counters[-1].bytes_up
    for residents in (0, 2, 5):
        result = train(setup, residents)
        assert result.same_bits(wanted)
    assert train(setup, 0).counters[-1].bytes_up < dense


@pytest.mark.parametrize("recompute", [None, "all"])
def test_blocks_that_get_no_gradient_are_not_waited_for(recompute: str | None) -> None:
    """A frozen prefix: with nothing to train before the third single block no backward reaches the first
    ones.
    """
    setup = Setup(recompute=recompute, temb_trains=False, input_trains=False, pairs=0, singles=8, steps=5)
    setup.prefix_adapter = False
    wanted = train(setup, None)
    assert "singles.2.a" in wanted.gradients and "singles.1.a" not in wanted.gradients
    for residents in (0, 3):
        result = train(setup, residents)
        assert result.same_bits(wanted)
        assert result.counters[-1].loads <= 2 * (8 - residents - 2)
        assert result.counters[-1].demanded == 0


@pytest.mark.parametrize("recompute", [None, "all"])
def test_compiled_blocks_are_equal_and_never_compiled_again(recompute: str | None) -> None:
    torch._dynamo.reset()
    setup = Setup(recompute=recompute, pairs=1, singles=4, compile=True)
    wanted = train(setup, None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    result = train(setup, 1)
    assert result.same_bits(wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * 2


def test_accumulated_micro_steps_are_equal() -> None:
    def run(swap: bool) -> list[torch.Tensor]:
        net = build(Setup())
        if swap:
            SwapEngine(net, LISTS, 1, CpuBackend(3), smallest_bytes=0).attach()
        for step in range(4):
            (net(*inputs(step)).square().mean() / 4).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("recompute", [None, "all"])
def test_two_forwards_before_one_backward(recompute: str | None) -> None:
    """Guidance in training, DPO and the like: both passes' saved tensors wait while the blocks come and
    go.
    """
    results = []
    for residents in (None, 0, 2, 4):
        setup = Setup(recompute=recompute)
        net = build(setup)
        if recompute:
            from whitetuner.memory.recompute import checkpoint_blocks

            checkpoint_blocks(net, LISTS, recompute)
        engine = None
        if residents is not None:
            engine = SwapEngine(net, LISTS, residents, CpuBackend(5), smallest_bytes=0).attach()
        for step in range(3):
            net.zero_grad()
            first, second = net(*inputs(step)), net(*inputs(step + 10))
            (first * second).square().mean().backward()
            counted = engine.step_end() if engine else None
        if counted is not None and engine is not None:
            # forward, forward, backward, backward: a pass after one of the same direction finds nothing of
            # use
            assert counted.loads <= 4 * len(engine.placement.streamed) and counted.demanded <= 1
        results.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("style", ["with_keywords", "outer_checkpoint", "reentrant_checkpoint"])
def test_sampling_in_between_changes_nothing(style: str) -> None:
    def run(swap: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        net = build(Setup(style=style))
        if swap:
            SwapEngine(net, LISTS, 1, CpuBackend(7), smallest_bytes=0).attach()
        drawn = []
        for step in range(6):
            if step % 2:
                net(*inputs(step)).square().mean().backward()
            else:
                with torch.no_grad():
                    drawn += [net(*inputs(50 + step)), net(*inputs(60 + step))]
        return [p.grad for p in net.parameters() if p.grad is not None], drawn

    for ours, wanted in zip(run(True), run(False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_a_second_backward_through_the_same_graph() -> None:
    def run(swap: bool) -> list[torch.Tensor]:
        net = build(Setup())
        if swap:
            SwapEngine(net, LISTS, 0, CpuBackend(1), smallest_bytes=0).attach()
        loss = net(*inputs(0)).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_the_gradient_of_one_parameter_alone() -> None:
    def run(swap: bool) -> list[torch.Tensor]:
        net = build(Setup())
        if swap:
            SwapEngine(net, LISTS, 0, CpuBackend(1), smallest_bytes=0).attach()
        found = []
        for name in ("singles.3.a", "pairs.1.image.b", "singles.0.b"):
            loss = net(*inputs(0)).square().mean()
            found += torch.autograd.grad(loss, [dict(net.named_parameters())[name]])
        return found

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


class Experts(torch.nn.Module):
    """Two denoisers of which a step uses one (WAN 2.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = build(Setup(pairs=1, singles=4)), build(Setup(pairs=1, singles=4))


def test_two_experts_share_the_slots() -> None:
    def run(swap: bool) -> list[torch.Tensor]:
        experts = Experts()
        if swap:
            lists = tuple(f"{expert}.{name}" for expert in ("high", "low") for name in LISTS)
            engine = SwapEngine(experts, lists, 3, CpuBackend(2), smallest_bytes=0).attach()
        for step, expert in enumerate(["high", "high", "low", "high", "low", "low"]):
            getattr(experts, expert)(*inputs(step)).square().mean().backward()
        if swap:
            assert len(engine.placement.buffers) == 2
        return [p.grad for p in experts.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_a_checkpoint_over_two_blocks_needs_one_slot_more() -> None:
    def run(net: Net) -> list[torch.Tensor]:
        def segment(x: torch.Tensor, temb: torch.Tensor, start: int) -> torch.Tensor:
            return net.singles[start + 1](net.singles[start](x, temb=temb), temb=temb)

        x, _, sigma = inputs(0)
        x, temb = net.embed(x), net.time(sigma)
        for start in (0, 2):
            x = torch.utils.checkpoint.checkpoint(segment, x, temb, start, use_reentrant=False)
        x.square().mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    setup = Setup(pairs=0, singles=4)
    wanted = run(build(setup))
    for slots in (2, 3):
        net = build(setup)
        SwapEngine(net, LISTS[1:], 0, CpuBackend(), slots=slots, smallest_bytes=0).attach()
        assert all(torch.equal(a, b) for a, b in zip(run(net), wanted, strict=True))
