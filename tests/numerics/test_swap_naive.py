"""The tests above can fail: engines with the mistakes that others made give other bits, or stop."""

from __future__ import annotations

import pytest
import swap_standins
import torch
from swap_standins import Setup, train
from torch import nn

from whitetuner.memory.swap import calls
from whitetuner.memory.swap.engine import SwapEngine


def differs(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, engine: type[SwapEngine], residents: int = 0
) -> bool:
    wanted = train(setup, None)
    monkeypatch.setattr(swap_standins, "SwapEngine", engine)
    try:
        return not train(setup, residents).same_bits(wanted)
    except (RuntimeError, AssertionError):
        return True


class TakesModuleHooks(SwapEngine):
    """Takes a module's full backward hooks for the begin and the end of its backward."""

    def attach(self) -> SwapEngine:
        super().attach()
        for index, layout in enumerate(self.layouts):
            layout.block.register_full_backward_pre_hook(lambda *_, index=index: self._begins(index))
            layout.block.register_full_backward_hook(lambda *_, index=index: self._finish(index))
        return self

    def _begins(self, index: int) -> None:
        running = calls.backward_pass()
        assert running is not None
        self._hold(index, running, 0)

    def _backward_begins(self, index: int, call: int) -> None:
        return


def test_a_backward_hook_frees_too_early_when_blocks_are_called_with_keywords(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not differs(Setup("with_positions", "all", pairs=0, singles=6), monkeypatch, TakesModuleHooks)
    assert differs(Setup("with_keywords", "all", pairs=0, singles=6), monkeypatch, TakesModuleHooks)


class FreesInForwardHook(SwapEngine):
    """Holds a block from its forward pre-hook to its forward hook, in the second computation too."""

    def attach(self) -> SwapEngine:
        super().attach()
        for index, layout in enumerate(self.layouts):
            layout.block.register_forward_pre_hook(lambda *_, index=index: self._pinned(index))
            layout.block.register_forward_hook(lambda *_, index=index: self._open.discard(index))
        return self

    _open: set[int] = set()  # noqa: RUF012

    def _pinned(self, index: int) -> None:
        self._open.add(index)

    def _busy(self) -> frozenset[int]:
        numbers = {self.placement.number[i] for i in self._open}
        return super()._busy() | frozenset(n for n in numbers if n is not None)


def test_a_forward_hook_never_runs_when_the_second_computation_stops_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FreesInForwardHook._open = set()
    assert not differs(Setup("with_keywords", None), monkeypatch, FreesInForwardHook)
    FreesInForwardHook._open = set()
    assert differs(Setup("outer_checkpoint", None), monkeypatch, FreesInForwardHook)


class KeepsAliases(SwapEngine):
    """Lets autograd keep views of the slots."""

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_saved_tensors_that_lie_in_a_slot_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    assert differs(Setup(forwards=2), monkeypatch, KeepsAliases)
    assert not differs(Setup(forwards=2), monkeypatch, SwapEngine)
    assert not differs(Setup(recompute="all", forwards=2), monkeypatch, KeepsAliases)


def test_one_forward_alone_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one forward every block happens to come back into its own slot: why the tests above take two."""
    assert not differs(Setup(), monkeypatch, KeepsAliases)


class FreesAtFirstGradient(SwapEngine):
    """Loads a block when its first gradient arrives and gives its slot away at once."""

    def _backward_begins(self, index: int, call: int) -> None:
        super()._backward_begins(index, call)
        self._finish(index)
        for other in range(len(self.placement.streamed)):
            if self.placement.ring.place[other] is None:
                self.placement.load(other, self._room(other))
                return


def test_a_block_that_is_not_held_through_its_second_computation_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert differs(Setup(recompute="all", pairs=0, singles=6), monkeypatch, FreesAtFirstGradient)


class NeverWaits(SwapEngine):
    """Computes without waiting for the copy."""

    def attach(self) -> SwapEngine:
        super().attach()
        self.placement.arrive = lambda index: None  # type: ignore[method-assign]
        return self


@pytest.mark.parametrize("recompute", [None, "all"])
def test_computing_before_the_copy_has_arrived(
    recompute: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert differs(Setup(recompute=recompute), monkeypatch, NeverWaits)


class CoversTheCheckpoint(SwapEngine):
    """Pushes its saved-tensor hooks inside a checkpoint too."""

    def _call(self, index, forward, args, kwargs):  # type: ignore[no-untyped-def]
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return super()._call(index, forward, args, kwargs)


def test_hooks_over_a_checkpoint_switch_it_off() -> None:
    """Bits stay equal, so only the count of the computations tells."""
    runs = []
    for engine in (SwapEngine, CoversTheCheckpoint):
        net = swap_standins.build(Setup("outer_checkpoint", pairs=0, singles=4))
        seen: list[nn.Module] = []
        for block in net.singles:
            block.up.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module))
        engine(net, ("singles",), 0, swap_standins.CpuBackend(), smallest_bytes=0).attach()
        net(*swap_standins.inputs(0)).square().mean().backward()
        runs.append(len(seen))
    assert runs == [8, 4]


def test_evicted_parameters_are_not_numbers() -> None:
    net = swap_standins.build(Setup(pairs=0, singles=6))
    engine = SwapEngine(net, ("singles",), 0, swap_standins.CpuBackend(), smallest_bytes=0).attach()
    away = [i for i in range(6) if engine.placement.spot(i) is None]
    assert away and all(torch.isnan(net.singles[i].up.weight).all() for i in away)
