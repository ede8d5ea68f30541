"""Denoisers at their released size with random weights, and one training step over them.

The config comes from the family's sketch.py, the shapes of a sample from its `blank`, the step is the family's
own `predict`: what is timed is the module that trains, without a file of weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whitetuner.adapters.attach import attach
from whitetuner.adapters.choose import choose
from whitetuner.config.load import load_config
from whitetuner.config.schema import Config
from whitetuner.families import registry
from whitetuner.family import Family, ModelPaths, Part
from whitetuner.memory.blocks import blocks_of
from whitetuner.memory.measure import StepCost
from whitetuner.memory.quantize import Kind, quantize_linears
from whitetuner.memory.skeleton import sketch_module
from whitetuner.memory.weigh import Weights, weigh
from whitetuner.planning import Shape, Sketched
from whitetuner.records import Batch, Item, Size
from whitetuner.rehearsal import adapter_settings
from whitetuner.released import released

#: Names on the command line -> family and variant. "tiny": a model of a few kilobytes, for trying the script.
MODELS: dict[str, tuple[str, str | None]] = {
    "klein-4b": ("flux2-klein", "base-4b"),
    "klein-9b": ("flux2-klein", "base-9b"),
    "zimage": ("zimage", None),
    "qwen-image": ("qwen-image", "t2i"),
    "tiny": ("flux2-klein", None),
}
#: Klein with every number small: twelve blocks, so that something is streamed.
_TINY = {
    "_class_name": "Flux2Transformer2DModel",
    "in_channels": 128,
    "guidance_embeds": False,
    "num_layers": 4,
    "num_single_layers": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "axes_dims_rope": [8, 8, 8, 8],
}


@dataclass
class Subject:
    """A model to be measured. lists: its block lists;  cost: of one step;  weights: its bytes in each base."""

    name: str
    family: Family
    part: Part
    config: Config
    shape: Shape
    device: torch.device
    keep_precise: tuple[str, ...]
    cost: StepCost
    weights: dict[str, Weights] = field(default_factory=dict)

    @property
    def lists(self) -> tuple[str, ...]:
        return tuple(self.part.block_lists)

    def build(self, base: str) -> nn.Module:
        """On the host, with the adapter on the device. Weights are drawn where it is quick, one block at a time;
        the same ones every time."""
        module = self.family.load(partial(sketch_module, dtype=torch.bfloat16))[self.part.name]
        names = [name for name, _ in module.named_parameters()]
        kept = frozenset(n for n in names if any(fnmatchcase(n, pattern) for pattern in self.keep_precise))
        generator = torch.Generator(self.device).manual_seed(0)
        for path, block in blocks_of(module, self.lists):
            _fill(block, self.device, generator)
            if base != "bf16":
                quantize_linears(block, _kind(base), _inside(kept, path))
            block.to("cpu")
        _fill(module, self.device, generator)
        if base != "bf16":
            moved = _inside_any([path for path, _ in blocks_of(module, self.lists)], names)
            quantize_linears(module, _kind(base), kept | moved)
        module.to("cpu")
        paths = choose(module, list(self.family.spec.adapter_targets))
        attach(module, paths, adapter_settings(self.config), seed=0, device=self.device)
        return module

    def batch(self) -> tuple[Batch, torch.Tensor]:
        """(batch of random content on the device, x_t)."""
        spec = self.family.spec
        part = self.family.load(partial(sketch_module, dtype=torch.bfloat16))[self.part.name]
        fields = registry.sketch(spec.name).blank(part, self.family.options, self.shape.size, spec.stride_px)
        layouts = {
            n: kind for one in self.family.encoders(self.config.model.task) for n, kind in one.fields.items()
        }
        generator = torch.Generator().manual_seed(1)
        filled: dict[str, Any] = {}
        for name, one in fields.items():
            if one.is_floating_point():
                one = torch.randn(one.shape, generator=generator)
            filled[name] = one[None].to(self.device) if layouts[name] == "stack" else [one.to(self.device)]
        item = Item("bench-0", Path("bench"), "", "", self.shape.size, self.shape.size)
        return Batch((item,), (0,), filled), filled["latent"]


def _kind(base: str) -> Kind:
    assert base in ("int8", "fp8", "nf4")
    return base  # type: ignore[return-value]


def _fill(module: nn.Module, device: torch.device, generator: torch.Generator) -> None:
    """Draws every parameter that is still on the meta device; norms' weights stay near one."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 2500
                value.normal_(std=fan_in**-0.5, generator=generator)
                if parameter.ndim == 1 and name == "weight":
                    value += 1
                child._parameters[name] = nn.Parameter(value, requires_grad=False)


def _inside(names: frozenset[str], path: str) -> frozenset[str]:
    return frozenset(name.removeprefix(f"{path}.") for name in names if name.startswith(f"{path}."))


def _inside_any(paths: list[str], names: list[str]) -> frozenset[str]:
    return frozenset(name for name in names if any(name.startswith(f"{path}.") for path in paths))


@contextmanager
def subject(name: str, px: int, device: torch.device, bases: tuple[str, ...]) -> Iterator[Subject]:
    """A model of MODELS at a square of `px` pixels."""
    family_name, variant = MODELS[name]
    spec = registry.spec(family_name)
    with tempfile.TemporaryDirectory(prefix="whitetuner-bench-") as folder:
        if name == "tiny":
            part_folder = Path(folder) / "transformer"
            part_folder.mkdir()
            (part_folder / "config.json").write_text(json.dumps(_TINY), encoding="utf-8")
            family = registry.load(
                family_name, spec.options(), ModelPaths(None, {"transformer": part_folder})
            )
        else:
            family, variant = released(family_name, variant, Path(folder) / "released")
        task = spec.tasks_of(variant)[0] if variant else spec.tasks[0]
        values = {"run.name": "bench", "model.family": family_name, "model.task": task, "model.path": folder}
        config = load_config(None, base=values).config
        part = spec.parts(family.options)[0]
        shape = Shape(Size(px, px))
        sketched = Sketched(family, part, spec.stride_px, torch.bfloat16)
        made = Subject(
            name, family, part, config, shape, device, tuple(spec.keep_precise), sketched.cost(config, shape)
        )
        for base in bases:
            module = sketched.module(config, None if base == "bf16" else _kind(base))
            made.weights[base] = weigh(module, made.lists)
        yield made


class Stepper:
    """Forward and backward of one model, timed."""

    def __init__(self, subject: Subject, module: nn.Module) -> None:
        self.subject, self.module = subject, module
        self._batch, self._x = subject.batch()

    def forward(self) -> torch.Tensor:
        part = self.subject.part
        low, high = part.sigma_range
        sigma = torch.full((1,), (low + high) / 2, device=self._x.device)
        said = self.subject.family.predict({part.name: self.module}, part.name, self._batch, self._x, sigma)
        return (said - self._x).square().mean()

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]
