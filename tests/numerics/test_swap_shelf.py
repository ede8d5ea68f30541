"""Two models in turns, the one that waits in a file: the same bits, half the host memory, and no word of it left behind."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch
from swap_standins import LISTS, Net, Setup, build, inputs

from whitetuner.errors import UserError
from whitetuner.memory.swap.backend import CpuBackend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.memory.swap.host import mapped
from whitetuner.memory.swap.shelf import Shelf

torch.set_num_threads(1)


def learned(net: Net, step: int) -> list[torch.Tensor]:
    net.zero_grad()
    net(*inputs(step)).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("residents", [0, 2])
def test_parked_between_turns_gives_the_same_bits(tmp_path: Path, residents: int) -> None:
    """Masters, absent parameters and void slots are NaN where the engine does not know that they hold something."""
    wanted, net = build(Setup()), build(Setup())
    engine = SwapEngine(net, LISTS, residents, CpuBackend(3), smallest_bytes=0).attach()
    shelf = Shelf(tmp_path)
    for step in range(4):
        if step % 2:
            engine.park(shelf)
            engine.park(shelf)  # twice is once
            engine.evict()
        assert all(torch.equal(a, b) for a, b in zip(learned(net, step), learned(wanted, step), strict=True))


def test_state_is_read_and_written_of_a_parked_model(tmp_path: Path) -> None:
    wanted, net = build(Setup()), build(Setup())
    engine, shelf = SwapEngine(net, LISTS, 1, CpuBackend(1), smallest_bytes=0).attach(), Shelf(tmp_path)
    engine.park(shelf)
    state, right = net.state_dict(), wanted.state_dict()
    assert state.keys() == right.keys() and all(torch.equal(state[name], right[name]) for name in right)
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in right.items()}
    engine.park(shelf)
    net.load_state_dict(other)
    engine.park(shelf)  # what was written since is parked, not what the file held before
    assert all(torch.equal(tensor, other[name]) for name, tensor in net.state_dict().items())
    engine.park(shelf)
    engine.detach()
    assert all(torch.equal(tensor, other[name]) for name, tensor in net.state_dict().items())


def test_host_memory_is_given_back_and_the_file_has_no_name(tmp_path: Path) -> None:
    class Mapped(CpuBackend):
        def master(self, num_bytes: int) -> torch.Tensor:
            return mapped(num_bytes)

    size = 48 << 20
    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList([torch.nn.Linear(size // 4096, 1024, bias=False) for _ in range(2)])
    net.requires_grad_(False)
    engine = SwapEngine(net, ("blocks",), 0, Mapped(None, poison=False)).attach()
    engine.evict()
    process, shelf = psutil.Process(os.getpid()), Shelf(tmp_path)
    before = process.memory_info().rss
    engine.park(shelf)
    assert before - process.memory_info().rss > 1.9 * size
    assert list(tmp_path.iterdir()) == []
    del engine


def test_a_disk_that_cannot_hold_it_is_told_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, net = build(Setup()), build(Setup())
    engine = SwapEngine(net, LISTS, 1, CpuBackend(1), smallest_bytes=0).attach()
    with pytest.raises(UserError, match="experts_on_disk = false"):
        engine.park(Shelf(tmp_path / "gone"))
    assert all(torch.equal(a, b) for a, b in zip(learned(net, 0), learned(wanted, 0), strict=True))
    shelf = Shelf(tmp_path)
    engine.park(shelf)
    assert shelf._file is not None
    shelf._file.truncate(100)
    with pytest.raises(UserError, match="cannot be read back"):
        learned(net, 1)
