"""E4, E5, E6 for every family of the registry, on its real classes made tiny, with real adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.families import registry
from whitetuner.families.contract import Bench, Case, quiet
from whitetuner.family import ModelPaths
from whitetuner.memory.build import Build
from whitetuner.memory.quantize import Kind, QuantLinear
from whitetuner.memory.recompute import Recompute, checkpoint_blocks
from whitetuner.memory.swap.backend import Counters, CpuBackend
from whitetuner.memory.swap.engine import SwapEngine
from whitetuner.records import Batch, Size

torch.set_num_threads(1)


@dataclass
class Place:
    """A tiny model of a family on disk, a batch for it, and its parts."""

    name: str
    task: str
    folder: str
    batch: Batch
    noise: torch.Tensor


@pytest.fixture(
    scope="module",
    params=[(name, *pair) for name in registry.FAMILIES for pair in registry.spec(name).pairs()],
    ids=lambda param: "-".join(param),
)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    name, variant, task = request.param
    folder = tmp_path_factory.mktemp(name) / "model"
    with quiet():
        registry.make_tiny(name, str(folder), variant)
        family = registry.load(
            name, registry.spec(name).options(**registry.spec(name).tiny_options), ModelPaths(Path(folder))
        )
        stride, frames = family.stride(), registry.spec(name).frames
        size = Size(4 * stride, 4 * stride, 2 * frames + 1 if frames else 1)
        conditions = (Size(5 * stride, 4 * stride),) if task == "edit" else ()
        if task == "i2v":
            conditions = (size._replace(frames=1),)
        bench = Bench(family, Build(), task)
        batch = bench.batch(Case(("a red circle",), size, condition_sizes=conditions).inputs())
    latent = batch["latent"]
    assert isinstance(latent, torch.Tensor)
    yield Place(
        name, task, str(folder), batch, torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    )


@dataclass
class Trained:
    losses: list[float]
    tensors: dict[str, torch.Tensor]
    counters: list[Counters]
    runs: list[int]
    quantised: int


def train(
    place: Place, part_name: str, quantize: Kind | None, recompute: str, residents: int | None, seed: int = 0
) -> Trained:
    spec = registry.spec(place.name)
    options = spec.options(**spec.tiny_options)
    family = registry.load(place.name, options, ModelPaths(Path(place.folder)))
    part = next(p for p in spec.parts(options) if p.name == part_name)
    with quiet():
        modules = family.load(Build(quantize=quantize))
    module: nn.Module = modules[part_name]
    settings = AdapterSettings(kind="lokr", rank=2, alpha=2, factor=4)
    adapter = attach(module, choose(module, spec.adapter_targets), settings, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    handle: Recompute = checkpoint_blocks(module, part.block_lists, recompute)
    engine = None
    if residents is not None:
        engine = SwapEngine(module, part.block_lists, residents, CpuBackend(seed), smallest_bytes=0).attach()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    low, high = part.sigma_range
    losses, counters = [], []
    for step in range(3):
        handle.reset_counts()
        sigma = torch.full((len(place.noise),), low + (high - low) * (step + 1) / 4)
        velocity = family.predict(modules, part_name, place.batch, place.noise * (step + 1) / 2, sigma)
        loss = (velocity - place.noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if engine is not None:
            counters.append(engine.step_end())
    tensors = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    tensors |= {f"{n}.grad": p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
    quantised = sum(isinstance(m, QuantLinear) for m in module.modules())
    return Trained(losses, tensors, counters, handle.runs, quantised)


def parts(place: Place) -> list[str]:
    spec = registry.spec(place.name)
    return [part.name for part in spec.parts(spec.options(**spec.tiny_options))]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_swap_and_recompute_change_no_bit(place: Place, quantize: Kind | None) -> None:
    for part in parts(place):
        plain = train(place, part, quantize, "none", None)
        count = len(plain.runs)
        passes = plain.runs[0]  # GLM-Image's edit sends the given pictures ahead, without gradients
        assert plain.runs == [passes] * count and passes <= 1 + (place.task == "edit")
        assert (plain.quantised > 0) == (quantize is not None)
        assert all(torch.isfinite(t).all() for t in plain.tensors.values())
        for recompute, runs in (("none", passes), ("all", passes + 1)):
            for residents in (None, *range(count - 1)):
                ours = train(place, part, quantize, recompute, residents, seed=residents or 0)
                assert ours.losses == plain.losses
                assert ours.tensors.keys() == plain.tensors.keys()
                assert all(torch.equal(t, plain.tensors[n]) for n, t in ours.tensors.items())
                assert ours.runs == [runs] * count
                assert all(c.copies_back == 0 and c.demanded == 0 for c in ours.counters[1:])


def test_gradient_reaches_every_adapter_through_a_quantised_base(place: Place) -> None:
    for part in parts(place):
        for kind in ("int8", "fp8", "nf4"):
            trained = train(place, part, kind, "none", None)  # type: ignore[arg-type]
            dense = train(place, part, None, "none", None)
            assert {n for n, t in trained.tensors.items() if t.any()} == {
                n for n, t in dense.tensors.items() if t.any()
            }
