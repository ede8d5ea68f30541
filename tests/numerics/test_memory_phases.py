"""A text encoder larger than the card is streamed by layers: to the bit, within the bytes allowed, and given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from whitetuner.errors import UserError
from whitetuner.memory.build import Build
from whitetuner.memory.phases import PhaseBuild, longest_list
from whitetuner.memory.skeleton import sketch_module
from whitetuner.memory.swap.backend import Backend, CpuBackend
from whitetuner.memory.weigh import weigh

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    path = tmp_path_factory.mktemp("encoder")
    Qwen3Model(config).save_pretrained(path)
    return path


def backend(device: torch.device) -> Backend:
    return CpuBackend(1)


def states(model: Qwen3Model) -> list[torch.Tensor]:
    tokens = torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        return list(model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states)


def bytes_of(folder: Path) -> tuple[int, int]:
    """(of the largest layer, of everything)"""
    sketch = sketch_module(Qwen3Model, folder)
    weights = weigh(sketch, longest_list(sketch))
    return max(weights.blocks), sum(weights.blocks) + weights.rest


@pytest.mark.parametrize("layers_that_fit", [2, 3, 5])
def test_streamed_is_resident_to_the_bit(folder: Path, layers_that_fit: int) -> None:
    layer, whole = bytes_of(folder)
    budget = whole - 6 * layer + layers_that_fit * layer + 2048
    told: list[str] = []
    build = PhaseBuild(Build(), budget, room_bytes=0, backend=backend, tell=told.append)
    model = build(Qwen3Model, folder)
    (engine,) = build.engines
    held = sum(engine.layouts[i].num_bytes for i in engine.residents)
    assert held + 2 * layer <= budget and len(engine.residents) == layers_that_fit - 2
    assert "6 blocks are streamed" in told[0]
    plain = states(Build()(Qwen3Model, folder))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(states(model), plain, strict=True))
    again = build(Qwen3Model, folder)  # the next model of the phase: the one before has given its memory back
    assert not engine.attached and len(build.engines) == 1
    assert all(torch.equal(a, b) for a, b in zip(states(again), plain, strict=True))
    build.release()
    assert not build.engines
    assert all("forward" not in module.__dict__ for module in again.modules())


def test_what_fits_is_built_as_it_is(folder: Path) -> None:
    _, whole = bytes_of(folder)
    for budget in (None, whole + 1):
        build = PhaseBuild(Build(), budget, room_bytes=0, backend=backend)
        build(Qwen3Model, folder)
        assert not build.engines


def test_too_little_for_two_layers_is_told_with_the_bytes(folder: Path) -> None:
    layer, whole = bytes_of(folder)
    build = PhaseBuild(Build(), whole - 5 * layer, room_bytes=0, backend=backend)
    with pytest.raises(UserError, match="though its blocks are streamed") as told:
        build(Qwen3Model, folder)
    assert told.value.values["need"] > told.value.values["have"]
