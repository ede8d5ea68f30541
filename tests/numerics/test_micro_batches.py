"""Micro-batches inside a block: the same gradients to rounding, one load, a piece's activations at a time."""

from __future__ import annotations

import pytest
import torch
from swap_standins import WIDTH, Net
from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.memory.fit import fit
from whitetuner.memory.micro import MicroBatches, micro_batches
from whitetuner.memory.swap.backend import CpuBackend

BATCH = 5
NAMES = ("hidden_states", "temb")


def one_pass(samples: int, residents: int | None, full: bool) -> tuple[dict[str, Tensor], int, int]:
    """(gradients, blocks brought, most samples inside a block)"""
    torch.manual_seed(0)
    model = Net(pairs=0, singles=4)
    if full:
        model.requires_grad_(True)
    inside: list[int] = []
    for block in model.singles:
        block.up.register_forward_hook(lambda _, __, made: inside.append(len(made)))
    backend = CpuBackend(1)
    fitted = fit(
        model,
        ("singles",),
        "cpu",
        residents=None if residents is None else range(residents),
        trained=full,
        backend=backend,
        micro=micro_batches(samples, NAMES, "transformer"),
        tell=lambda _: None,
    )
    x, sigma = torch.randn(BATCH, 6, WIDTH), torch.randn(BATCH, 1, WIDTH)
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.__setitem__(name, p.grad.clone())
            )
    model(x, x, sigma).square().mean().backward()
    loads = 0 if fitted.engine is None else fitted.engine.counters.loads
    return gradients, loads, max(inside)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_pieces_change_rounding_only_and_swap_changes_nothing(samples: int, full: bool) -> None:
    whole, whole_loads, whole_inside = one_pass(0, 1, full)
    swapped, loads, inside = one_pass(samples, 1, full)
    resident, _, _ = one_pass(samples, None, full)
    assert whole.keys() == swapped.keys() == resident.keys() and whole
    for name, tensor in whole.items():
        assert (swapped[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-12, name
        assert torch.equal(swapped[name], resident[name]), name
    assert loads == whole_loads > 0
    assert (whole_inside, inside) == (BATCH, samples)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UserError, match="does not say"):
        micro_batches(1, (), "transformer")
    block = Net(pairs=0, singles=1).singles[0]
    pieced = MicroBatches(1, NAMES).wrap(block, block.forward)
    with pytest.raises(UserError, match="temb cannot be cut"):
        pieced(torch.randn(4, 6, WIDTH), temb=torch.randn(3, 1, WIDTH))
