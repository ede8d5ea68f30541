"""E6: a block that is computed again gives the same bits, exactly twice for those chosen and once for the
others.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch import nn

from whitetuner.memory.blocks import blocks_of
from whitetuner.memory.recompute import checkpoint_blocks, chunk_tokens

torch.set_num_threads(1)
LISTS = ("transformer_blocks", "single_transformer_blocks")


def model() -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return transformer.eval()


def loss_of(transformer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.zeros(6, 4)
    ids[:, 1] = torch.arange(6)
    out = transformer(
        hidden_states=draw(2, 6, 16),
        encoder_hidden_states=draw(2, 5, 48),
        timestep=torch.tensor([0.3, 0.8]),
        img_ids=ids,
        txt_ids=torch.zeros(5, 4),
        guidance=None,
        return_dict=False,
    )[0]
    return out.square().mean()


def gradients(transformer: nn.Module) -> dict[str, torch.Tensor]:
    transformer.zero_grad()
    loss_of(transformer).backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("which", ["all", "none", (0, 3), (4,)])
def test_gradients_are_equal_to_the_bit(which: str | Iterable[int]) -> None:
    plain = gradients(model())
    transformer = model()
    handle = checkpoint_blocks(transformer, LISTS, which)
    ours = gradients(transformer)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert handle.runs == [2 if i in handle.which else 1 for i in range(5)]
    handle.remove()
    assert all("forward" not in block.__dict__ for _, block in blocks_of(transformer, LISTS))
    again = gradients(transformer)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_checkpointed_blocks_keep_only_their_inputs() -> None:
    def kept(which: str) -> int:
        transformer = model()
        handle = checkpoint_blocks(transformer, LISTS, which)
        own = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss_of(transformer)
        handle.remove()
        return sum(sizes.values())

    assert kept("all") < kept("none") / 4


def test_the_modules_own_checkpointing_is_switched_off() -> None:
    transformer = model()
    transformer.enable_gradient_checkpointing()
    handle = checkpoint_blocks(transformer, LISTS, "all")
    gradients(transformer)
    assert handle.runs == [2] * 5


def test_no_gradient_means_no_second_run() -> None:
    transformer = model()
    handle = checkpoint_blocks(transformer, LISTS, "all")
    with torch.no_grad():
        loss_of(transformer)
    assert handle.runs == [1] * 5
    handle.reset_counts()
    transformer.requires_grad_(False)
    loss_of(transformer)
    assert handle.runs == [1] * 5


def test_a_feed_forward_in_pieces_gives_the_same_gradients_within_rounding() -> None:
    plain = gradients(model())
    transformer = model()
    chunks = chunk_tokens([block.ff for block in transformer.transformer_blocks], 4)
    handle = checkpoint_blocks(transformer, LISTS, "all")
    ours = gradients(transformer)
    for name, wanted in plain.items():
        assert torch.allclose(ours[name], wanted, rtol=1e-4, atol=1e-8), name
    handle.remove()
    chunks.remove()
    assert "forward" not in transformer.transformer_blocks[0].ff.__dict__


def test_pieces_keep_less_than_the_whole() -> None:
    torch.manual_seed(0)
    feed_forward = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).requires_grad_(False)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(1, 64, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            feed_forward(x)
        return sum(sizes.values())

    whole = kept()
    chunks = chunk_tokens([feed_forward], 8)
    assert kept() < whole / 2
    chunks.remove()


def test_unknown_lists_and_blocks_are_named() -> None:
    transformer = model()
    with pytest.raises(ValueError, match="no block list 'layers'"):
        checkpoint_blocks(transformer, ("layers",))
    with pytest.raises(ValueError, match="not a list of blocks"):
        checkpoint_blocks(transformer, ("x_embedder",))
    with pytest.raises(ValueError, match="5 blocks"):
        checkpoint_blocks(transformer, LISTS, (5,))
    with pytest.raises(ValueError, match="'all', 'none'"):
        checkpoint_blocks(transformer, LISTS, "some")
