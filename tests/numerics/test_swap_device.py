"""The backend of real devices: its ladder of pinned memory, on the CPU's own (empty) streams; GPU twins
below.
"""

from __future__ import annotations

import pytest
import torch
from swap_standins import LISTS, Setup, build, inputs, train

from whitetuner.memory.swap import host
from whitetuner.memory.swap.backend import Backend
from whitetuner.memory.swap.device import DeviceBackend
from whitetuner.memory.swap.engine import SwapEngine


class Driver:
    """Stands in for the driver's pinning: takes `room` bytes, then refuses."""

    def __init__(self, room: int, staging: bool = True) -> None:
        self.room, self.staging = room, staging
        self.pinned: dict[int, int] = {}

    def register(self, buffer: torch.Tensor) -> bool:
        if sum(self.pinned.values()) + buffer.numel() > self.room:
            return False
        self.pinned[buffer.data_ptr()] = buffer.numel()
        return True

    def unregister(self, buffer: torch.Tensor) -> None:
        del self.pinned[buffer.data_ptr()]

    def buffer(self, size: int) -> torch.Tensor:
        if not self.staging:
            raise RuntimeError("CUDA error: out of memory")
        return torch.empty(size, dtype=torch.uint8)

    def backend(self, limit: int | None = None) -> DeviceBackend:
        return DeviceBackend(
            "cpu", limit_bytes=limit, register=self.register, unregister=self.unregister, staging=self.buffer
        )


LADDER = [
    ("pinned", Driver(10**9), None),
    ("partly pinned", Driver(20_000), None),
    ("partly pinned", Driver(10**9), 20_000),
    ("staged", Driver(0), None),
    ("pageable", Driver(0, staging=False), None),
]


@pytest.mark.parametrize(("mode", "driver", "limit"), LADDER)
@pytest.mark.parametrize("recompute", [None, "all"])
def test_every_rung_of_the_ladder_gives_the_same_bits(
    mode: str, driver: Driver, limit: int | None, recompute: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    setup = Setup(recompute=recompute)
    backend = driver.backend(limit)
    caplog.set_level("INFO")
    result = train(setup, 1, backend)
    assert backend.pinned is not None and backend.pinned.mode == mode
    assert (len(caplog.messages) == 1 and "memory" in caplog.messages[0]) or "pinned" in caplog.messages[0]
    assert result.same_bits(train(setup, None))
    backend.unseal()
    assert not driver.pinned


def test_a_failed_copy_is_told_and_not_computed_with() -> None:
    backend: Backend = Driver(0).backend()
    net = build(Setup())
    engine = SwapEngine(net, LISTS, 0, backend, smallest_bytes=0).attach()
    backend.load(torch.empty(3, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8), ())
    with pytest.raises(RuntimeError, match="copy of a swapped block failed"):
        backend.drain()
    assert engine.attached


def test_masters_are_whole_pages_of_their_own() -> None:
    for size in (1, 4096, 5000, 3 << 20):
        buffer = host.mapped(size)
        assert buffer.numel() == size and buffer.data_ptr() % 4096 == 0 and not buffer.any()
        buffer.fill_(7)
    assert host.mapped(0).numel() == 0


def test_pinning_stops_at_its_limit() -> None:
    masters = [host.mapped(1000) for _ in range(5)]
    assert host.pin(masters, lambda _: True, 3500) == {0, 1, 2}
    assert host.pin(masters, lambda m: m.data_ptr() != masters[1].data_ptr(), 10**6) == {0}


def test_the_sentences_name_the_gigabytes() -> None:
    for mode in ("pinned", "partly pinned", "staged", "pageable"):
        assert "20.40" in host.Pinned(mode, 3, 10**10, 20_400_000_000).sentence()


def test_host_memory_is_known() -> None:
    assert 10**8 < host.host_bytes() < 10**14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", [None, "all"])
@pytest.mark.parametrize("residents", [0, 2, 5])
def test_on_a_gpu_the_bits_are_those_of_the_resident_model(residents: int, recompute: str | None) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)

    def run(swap: bool) -> list[torch.Tensor]:
        net = build(Setup(recompute=recompute)).cuda()
        if swap:
            SwapEngine(net, LISTS, residents, DeviceBackend("cuda"), smallest_bytes=0).attach()
        for step in range(20):
            net(*(t.cuda() for t in inputs(step))).square().mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
