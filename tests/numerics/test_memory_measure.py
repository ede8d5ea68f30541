"""The plan's bytes, found without memory, are the bytes that autograd really saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from test_memory_recompute import LISTS, loss_of, model
from torch import nn

from whitetuner.memory.measure import measure_step
from whitetuner.memory.micro import MicroBatches
from whitetuner.memory.quantize import Kind, quantize_linears
from whitetuner.memory.recompute import checkpoint_blocks

torch.set_num_threads(1)


class Adapter(nn.Module):
    """A low-rank branch beside a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(base.in_features, 2) * 0.1)
        self.b = nn.Parameter(torch.randn(2, base.out_features) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a @ self.b


def adapted(quantize: Kind | None = None) -> nn.Module:
    transformer = model().requires_grad_(False)
    if quantize:
        quantize_linears(transformer, quantize)
    for block in transformer.transformer_blocks:
        block.attn.to_q = Adapter(block.attn.to_q)
    for block in transformer.single_transformer_blocks:
        block.attn.to_out = Adapter(block.attn.to_out)
    return transformer


def saved_bytes(transformer: nn.Module, which: str) -> int:
    """Counted the plain way: one hook over the whole forward, every storage once."""
    handle = checkpoint_blocks(transformer, LISTS, which)
    own = {p.untyped_storage().data_ptr() for p in (*transformer.parameters(), *transformer.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(transformer)
    handle.remove()
    assert loss.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("quantize", [None, "int8", "fp8", "nf4"])
def test_bytes_without_memory_equal_the_bytes_really_saved(quantize: Kind | None) -> None:
    transformer = adapted(quantize)
    fake = measure_step(transformer, LISTS, lambda: loss_of(transformer))
    real = measure_step(transformer, LISTS, lambda: loss_of(transformer), fake=False)
    # scratch memory within a kernel is not described (bitsandbytes' makes a copy of the weight)
    slack = 1.1 if quantize == "nf4" else 1.02
    assert real.peak_bytes / slack <= fake.peak_bytes <= real.peak_bytes * slack
    assert real.peak_bytes_plain / slack <= fake.peak_bytes_plain <= real.peak_bytes_plain * slack
    fake = replace(fake, peak_bytes=real.peak_bytes, peak_bytes_plain=real.peak_bytes_plain)
    assert fake == real
    outside = saved_bytes(transformer, "none") - sum(block.saved_bytes for block in fake.blocks)
    inputs = saved_bytes(transformer, "all") - sum(block.input_bytes for block in fake.blocks)
    # what is saved outside of the blocks (the last layer and the loss) is saved either way, but for tensors
    # that a block saves first
    assert 0 <= outside < min(block.saved_bytes for block in fake.blocks) and inputs >= 0
    assert all(block.flops > 0 and block.input_bytes < block.saved_bytes for block in fake.blocks)


def test_a_batch_in_pieces_is_measured_in_pieces() -> None:
    """What a block saves inside exists for one piece; its inputs are kept for the whole batch."""
    transformer = adapted()
    names = ("hidden_states", "encoder_hidden_states", "temb_mod", "temb_mod_img", "temb_mod_txt")
    micro, whole = MicroBatches(1, names), measure_step(transformer, LISTS, lambda: loss_of(transformer))
    fake = measure_step(transformer, LISTS, lambda: loss_of(transformer), micro=micro)
    real = measure_step(transformer, LISTS, lambda: loss_of(transformer), micro=micro, fake=False)
    assert real.peak_bytes / 1.02 <= fake.peak_bytes <= real.peak_bytes * 1.02
    assert fake.blocks == real.blocks
    assert fake.peak_bytes < whole.peak_bytes
    # joining the pieces' outputs costs the plain way a copy of each
    assert fake.peak_bytes_plain > whole.peak_bytes_plain * 0.9


def test_the_module_is_left_as_it_was() -> None:
    transformer = adapted()
    before = dict(transformer.named_parameters())
    measure_step(transformer, LISTS, lambda: loss_of(transformer))
    after = dict(transformer.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(p.grad is None for p in transformer.parameters())
    assert all("forward" not in m.__dict__ for m in transformer.modules())


def test_a_model_without_weights_is_measured_alike() -> None:
    real = adapted()
    empty = adapted().to("meta")
    assert measure_step(empty, LISTS, lambda: loss_of(empty)).blocks == (
        measure_step(real, LISTS, lambda: loss_of(real), fake=False).blocks
    )


def test_the_peak_of_a_mixture_is_that_of_its_parts() -> None:
    transformer = adapted()
    cost = measure_step(transformer, LISTS, lambda: loss_of(transformer))
    assert cost.peak_with(()) == cost.peak_bytes < cost.peak_bytes_plain == cost.peak_with(range(5))
    assert cost.flops_again(range(5)) == 0
    assert cost.flops_again(()) == sum(block.flops for block in cost.blocks) < cost.flops_forward
    assert cost.flops_backward > 0.9 * cost.flops_forward


def test_a_large_model_takes_seconds_and_no_memory() -> None:
    """WAN 14B's width and depth with 81 frames at 480p: a forward that would need 100 GB is measured here."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_layers=3).requires_grad_(False)
        transformer.blocks[0].attn1.to_q.weight.requires_grad_(True)
    transformer.rope.to_empty(device="cpu")
    video = torch.empty(1, 16, 21, 60, 104, device="meta")

    def step() -> torch.Tensor:
        x = torch.empty(video.shape)
        return (
            transformer(x, torch.tensor([500.0]), torch.empty(1, 512, 4096), return_dict=False)[0]
            .square()
            .mean()
        )

    cost = measure_step(transformer, ("blocks",), step)
    tokens = 21 * 30 * 52
    assert cost.blocks[1].input_bytes == tokens * 5120 * 4
    linear = 2 * tokens * (6 * 5120**2 + 2 * 5120 * 13824) + 2 * 512 * 2 * 5120**2
    attention = 4 * tokens * tokens * 5120 + 4 * tokens * 512 * 5120
    assert abs(cost.blocks[1].flops / (linear + attention) - 1) < 1e-3
