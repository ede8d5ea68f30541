"""What is told of many equal blocks from a few of them is what all of them need."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.memory.measure import measure_alike, measure_step
from whitetuner.memory.recompute import chunk_tokens


def test_ten_blocks_are_told_from_five() -> None:
    torch.manual_seed(0)
    module = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=10
    ).requires_grad_(False)
    attach(
        module, choose(module, ["blocks.*.to_[qkv]", "blocks.*.ffn.net.2"]), AdapterSettings("lokr"), seed=0
    )
    chunk_tokens([block.ffn for block in module.blocks], 16)

    def step() -> torch.Tensor:
        said = module(
            hidden_states=torch.zeros(1, 16, 3, 8, 8),
            timestep=torch.zeros(1),
            encoder_hidden_states=torch.zeros(1, 8, 16),
            return_dict=False,
        )[0]
        return said.square().mean()

    told, all_of_them = measure_alike(module, "blocks", step), measure_step(module, ("blocks",), step)
    assert len(module.blocks) == 10
    assert told.blocks == all_of_them.blocks
    for name in ("peak_bytes", "peak_bytes_plain", "flops_forward", "flops_backward"):
        one, other = getattr(told, name), getattr(all_of_them, name)
        assert abs(one - other) <= 0.01 * other, (name, one, other)
