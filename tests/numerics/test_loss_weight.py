"""A data set's loss_weight: a factor of its samples' part of the gradient, and of nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked_ranks
import numpy as np
import pytest
import torch
from PIL import Image

from whitetuner import recipe
from whitetuner.adapters.attach import Adapter, attach
from whitetuner.adapters.choose import choose
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.config.load import load_config
from whitetuner.evidence import checkpoint, digest, gradients, losses
from whitetuner.families import registry
from whitetuner.families.contract import Bench, Case
from whitetuner.family import ModelPaths
from whitetuner.records import Batch, Size
from whitetuner.runs import events
from whitetuner.tiny import tiny_values
from whitetuner.train.distributed import Ranks

Gradients = dict[str, torch.Tensor]


def plain_build(cls: Any, folder: Path, *, keep_precise: object = ()) -> Any:
    return cls.from_pretrained(folder).float().eval().requires_grad_(False)


class Tiny:
    """A tiny Klein with a LoRA on it that is not at its start, and a batch of two samples."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        registry.make_tiny("flux2-klein", str(folder))
        spec = registry.spec("flux2-klein")
        self.family = registry.load("flux2-klein", spec.options(**spec.tiny_options), ModelPaths(folder))
        bench = Bench(self.family, plain_build, "t2i")
        (self.part,) = bench.modules
        self.module = bench.modules[self.part]
        paths = choose(self.module, spec.adapter_targets)
        self.adapter: Adapter = attach(self.module, paths, AdapterSettings("lora", rank=2), seed=0)
        with torch.no_grad():
            for index, parameter in enumerate(self.adapter.parameters()):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
        self.given = bench.batch(Case(("a red circle", "two blue birds"), Size(64, 96)).inputs())

    def batch(self, *weights: float, of: tuple[int, ...] = (0, 1)) -> Batch:
        items = tuple(
            replace(self.given.items[i], loss_weight=weight) for i, weight in zip(of, weights, strict=True)
        )
        fields = {
            name: value[list(of)] if isinstance(value, torch.Tensor) else [value[i] for i in of]
            for name, value in self.given.fields.items()
        }
        return Batch(items, tuple(self.given.visits[i] for i in of), fields)

    def gradients(self, *batches: Batch) -> Gradients:
        return gradients(self.family, self.part, self.module, self.adapter, batches, seed=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    yield Tiny(tmp_path_factory.mktemp("tiny"))


def far(one: Gradients, two: Gradients) -> float:
    """Of the whole gradients, relative to the first."""
    assert one.keys() == two.keys() and one
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one)
    return (apart / sum(float(tensor.square().sum()) for tensor in one.values())) ** 0.5


@pytest.mark.parametrize("weight", [0.5, 2.0, 0.25])
def test_a_weight_scales_a_samples_gradient_exactly(tiny: Tiny, weight: float) -> None:
    """To the bit, since powers of two round nothing."""
    for sample in (0, 1):
        whole, scaled = (tiny.gradients(tiny.batch(w, of=(sample,))) for w in (1.0, weight))
        assert all(torch.equal(scaled[name], weight * whole[name]) for name in whole)
        assert any(tensor.any() for tensor in whole.values())


def test_a_weight_scales_its_own_sample_only_and_the_sum_is_divided_by_the_samples(tiny: Tiny) -> None:
    first, second = (tiny.gradients(tiny.batch(1.0, of=(sample,))) for sample in (0, 1))
    wanted = {name: (0.5 * first[name] + second[name]) / 2 for name in first}
    assert far(wanted, tiny.gradients(tiny.batch(0.5, 1.0))) < 1e-5  # E6's bound
    assert far(wanted, tiny.gradients(tiny.batch(1.0, 1.0))) > 1e-2
    accumulated = tiny.gradients(tiny.batch(0.5, of=(0,)), tiny.batch(1.0, of=(1,)))
    assert far(wanted, accumulated) < 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dotted values of a run over two sets, of three subject pictures and of four of the class."""
    folder = tmp_path_factory.mktemp("sets")
    registry.make_tiny("flux2-klein", str(folder / "model"))
    for name, count in (("own", 3), ("class", 4)):
        (folder / name).mkdir()
        for index in range(count):
            pixels = np.random.default_rng(10 * count + index).integers(0, 255, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    values = tiny_values("flux2-klein", folder / "model", folder / "own", folder)
    del values["data.images"]
    return {
        **values,
        "data.default_caption": "a cat",
        "data.sets": [
            {"images": str(folder / "own"), "repeats": 2},
            {"images": str(folder / "class"), "loss_weight": 0.5},
        ],
        "run.steps": 4,
        "save.every": 2,
        "data.batch_size": 2,
        "preview.every": 0,
        "validation.every": 0,
        "log.tensorboard": False,
    }


def config_of(place: dict[str, Any], name: str, weight: float = 0.5, **more: Any) -> Any:
    sets = [place["data.sets"][0], {**place["data.sets"][1], "loss_weight": weight}]
    return load_config(None, base={**place, "data.sets": sets, "run.name": name, **more})


def trained(place: dict[str, Any], name: str, weight: float = 0.5, **more: Any) -> Path:
    return recipe.run(config_of(place, name, weight, **more)).folder


def test_the_weight_changes_what_is_learned_and_not_how_the_first_loss_is_told(place: dict[str, Any]) -> None:
    half, one = trained(place, "half"), trained(place, "one", 1.0)
    assert digest(checkpoint(half, 4)) != digest(checkpoint(one, 4))
    assert losses(half)[0] == losses(one)[0]  # before anything is learned: losses are told without weights
    for step in events.read(half / "events.jsonl")[0]:
        if isinstance(step, events.StepDone):
            assert step.loss == pytest.approx(sum(step.losses) / step.samples, abs=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked from a process that has torch loaded")
def test_two_ranks_learn_what_two_accumulated_batches_teach_to_the_bit(
    place: dict[str, Any], tmp_path: Path
) -> None:
    """E7 with weights: a sample counts the same on whatever rank it comes."""

    def on_rank(ranks: Ranks) -> None:
        with recipe.Session.open(config_of(place, "two"), ranks=ranks) as session:
            session.run()

    forked_ranks.together(2, on_rank, tmp_path)
    one = trained(place, "accumulated", **{"optimizer.gradient_accumulation": 2})
    two = Path(place["run.output_dir"]) / "two"
    assert digest(checkpoint(two, 4)) == digest(checkpoint(one, 4)) and losses(two) == losses(one)
