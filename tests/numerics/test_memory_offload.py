"""Block inputs on the host: the same bits, less on the device, buffers used again."""

from __future__ import annotations

import pytest
import torch
from swap_standins import LISTS, Net, Setup, build, inputs

from whitetuner.memory.offload import InputsOnHost
from whitetuner.memory.recompute import checkpoint_blocks
from whitetuner.memory.swap.backend import CpuBackend
from whitetuner.memory.swap.engine import SwapEngine

torch.set_num_threads(1)


class Poisoned(InputsOnHost):
    """A buffer that is given back holds no numbers."""

    def _give_back(self, host: torch.Tensor, arrived: object) -> None:
        host.fill_(float("nan"))
        super()._give_back(host, arrived)


def gradients(net: Net, steps: int = 3) -> list[torch.Tensor]:
    for step in range(steps):
        net(*inputs(step)).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("which", ["all", (1, 2, 5)])
def test_inputs_that_waited_on_the_host_give_the_same_bits(which: str | tuple[int, ...], swap: bool) -> None:
    wanted = build(Setup())
    checkpoint_blocks(wanted, LISTS, which)
    net = build(Setup())
    offload = Poisoned("cpu", smallest_bytes=1)
    checkpoint_blocks(net, LISTS, which, keep_inputs=offload.saving)
    if swap:
        SwapEngine(net, LISTS, 1, CpuBackend(2), smallest_bytes=0).attach()
    assert all(torch.equal(a, b) for a, b in zip(gradients(net), gradients(wanted), strict=True))
    assert offload.host_bytes > 0


def test_two_forwards_before_a_backward() -> None:
    def run(net: Net) -> list[torch.Tensor]:
        for step in range(3):
            (net(*inputs(step)) * net(*inputs(step + 10))).square().mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    net, wanted = build(Setup()), build(Setup())
    checkpoint_blocks(net, LISTS, keep_inputs=Poisoned("cpu", smallest_bytes=1).saving)
    assert all(torch.equal(a, b) for a, b in zip(run(net), run(wanted), strict=True))


def test_host_buffers_are_used_again_and_large_inputs_leave_the_device() -> None:
    net = build(Setup(pairs=0, singles=6, temb_trains=False))
    offload = InputsOnHost("cpu", smallest_bytes=1)
    checkpoint_blocks(net, LISTS, keep_inputs=offload.saving)
    gradients(net, 1)
    once = offload.host_bytes
    gradients(net, 5)
    assert offload.host_bytes == once
    # hidden states of six blocks (2 x 5 x 16 float32), and temb once though every block saves it
    assert once == 6 * 2 * 5 * 16 * 4 + 2 * 1 * 16 * 4


def test_small_tensors_stay() -> None:
    net = build(Setup())
    offload = InputsOnHost("cpu")
    checkpoint_blocks(net, LISTS, keep_inputs=offload.saving)
    gradients(net, 1)
    assert offload.host_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_bits_are_the_same() -> None:
    results = []
    for offload in (None, InputsOnHost("cuda", smallest_bytes=1)):
        net = build(Setup()).cuda()
        if offload is None:
            checkpoint_blocks(net, LISTS)
        else:
            checkpoint_blocks(net, LISTS, keep_inputs=offload.saving)
        for step in range(20):
            net(*(t.cuda() for t in inputs(step))).square().mean().backward()
        results.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
