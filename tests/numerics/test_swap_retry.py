"""Out of memory: fewer residents, the same step, the same bits."""

from __future__ import annotations

import pytest
import torch
from swap_standins import LISTS, Net, Setup, build, inputs

from whitetuner.errors import UserError
from whitetuner.memory.swap.backend import CpuBackend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.retry import with_room


class Card:
    """Runs out of memory in the middle of a layer while more than `room` blocks are resident."""

    def __init__(self, net: Net, engine: SwapEngine, room: int, backward: bool) -> None:
        self.engine, self.room, self.tries = engine, room, 0
        net.singles[2].down.register_forward_hook(self.backward if backward else self.forward)

    def full(self) -> None:
        if len(self.engine.residents) > self.room:
            self.tries += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def forward(self, *_: object) -> None:
        self.full()

    def backward(self, module: object, args: object, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda _: self.full())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("recompute", [None, "all"])
@pytest.mark.parametrize("room", [0, 3])
def test_a_step_is_run_again_with_the_same_result(
    room: int, recompute: str | None, backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    setup = Setup(recompute=recompute)
    wanted, net = build(setup), build(setup)
    engine = SwapEngine(net, LISTS, 6, CpuBackend(1), smallest_bytes=0).attach()
    card = Card(net, engine, room, backward)
    for step in range(3):
        for model in (wanted, net):
            model.zero_grad()

        def run(step: int = step) -> float:
            loss = net(*inputs(step)).square().mean()
            loss.backward()
            return loss.item()

        loss = wanted(*inputs(step)).square().mean()
        loss.backward()
        assert with_room(run, engine, net.zero_grad) == loss.item()
        ours = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        theirs = {n: p.grad for n, p in wanted.named_parameters() if p.grad is not None}
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], g) for n, g in theirs.items())
    assert len(engine.residents) <= room and card.tries == len(caplog.messages) > 0
    assert "out of memory" in caplog.messages[0] and "run again" in caplog.messages[0]


def test_with_nothing_left_to_free_it_is_told() -> None:
    net = build(Setup())
    engine = SwapEngine(net, LISTS, 2, CpuBackend(1), smallest_bytes=0).attach()
    Card(net, engine, -1, False)
    with pytest.raises(UserError, match=r"every block is streamed .*Tried to allocate"):
        with_room(lambda: net(*inputs(0)).sum().backward(), engine, net.zero_grad)


def test_other_errors_pass() -> None:
    net = build(Setup())
    engine = SwapEngine(net, LISTS, 2, CpuBackend(1), smallest_bytes=0).attach()
    with pytest.raises(ZeroDivisionError):
        with_room(lambda: 1 / 0, engine, net.zero_grad)
    assert len(engine.residents) == 2
