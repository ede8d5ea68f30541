"""Equalities that every family is held to, against the diffusers pipeline that everybody else samples with.

E1  one Euler step with our `predict` is one step of the pipeline: clock, sign, packing, positions, masks,
prompt template
    and guidance in a single number, since an error in any of them changes the step.
E2  our encoders say what the pipeline's say.
E6  (the model's part) a batch says what its samples say alone, each at its own noise level.

All are functions, asked by the tests and by `whitetuner selftest`. A check that cannot fail proves nothing,
so there are
mutants: the family with one convention wrong, each of which has to fail the equality it belongs to. A family
brings its pipeline (`reference.py`: class Reference) and its own mutants (`mutants.py`: MUTANTS); those of
every family are here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from whitetuner.family import BuildFn, Family, prompts_only
from whitetuner.records import Batch, EncodeInput, Item, Size

#: Relative error of a step: float32 rounding through a whole model twice. A wrong convention is off by 1e-3
#: and more.
E1_TOLERANCE = 1e-5
#: Absolute error of embeddings and latents of size 1. The same operations in the same order, so the bits are
#: equal too.
E2_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """What a comparison is made on; pictures are drawn from the seed, one target for each caption.

    condition_sizes: of the reference pictures that each target has
    """

    captions: tuple[str, ...]
    size: Size
    cfg: float = 4.0
    steps: int = 2
    seed: int = 0
    condition_sizes: tuple[Size, ...] = ()

    def inputs(self) -> list[EncodeInput]:
        found = []
        for index, caption in enumerate(self.captions):
            seed = 100 * (self.seed + index)
            target = tuple(picture(self.size, seed + frame) for frame in range(self.size.frames))
            conditions = tuple(picture(size, seed + 50 + i) for i, size in enumerate(self.condition_sizes))
            found.append(EncodeInput(caption, target, conditions, conditions, self.size))
        return found


@dataclass(frozen=True)
class Walk:
    """A sampling of the pipeline. sigmas: steps + 1 numbers; points: as many (B, C, ...) float32 dense
    latents.
    """

    sigmas: Sequence[float]
    points: Sequence[Tensor]


class Reference(Protocol):
    """A family's diffusers pipeline, loaded by diffusers and called as its users call it, told in our
    conventions. One that guides in another way than `guide` has a method of that name and signature.
    """

    def __init__(self, folder: Path, options: Any) -> None: ...

    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        """One item in the fields of our encoders, by the pipeline's own methods. No batch dimension."""
        ...

    def walk(self, given: Sequence[EncodeInput], noise: Tensor, steps: int, cfg: float) -> Walk:
        """Samples from this noise (B, C, ...); guided against the empty prompt when cfg > 1."""
        ...


@dataclass(frozen=True)
class OriginalReader:
    """diffusers' own reading of a denoiser's file in its original layout: `READS_ORIGINAL` in a family's reference.py.

    convert:  tensors by the names in the file -> by those of diffusers
    any_size: whether it reads tiny models too; some have the released widths written into them
    """

    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    any_size: bool = True


class Bench:
    """A family with its denoisers and encoders loaded: what the equalities are asked of."""

    def __init__(self, family: Family, build: BuildFn, task: str) -> None:
        self.family = family
        self.encoders = family.encoders(task)
        for encoder in self.encoders:
            encoder.load(build)
        self.modules = family.load(build)

    def encode(self, given: EncodeInput) -> dict[str, Tensor]:
        """Every encoder's words; those of encoders for prompts alone where there is no target."""
        fields: dict[str, Tensor] = {}
        for encoder in self.encoders:
            if not (given.target and prompts_only(encoder)):
                fields.update(encoder.encode(given))
        return fields

    def batch(self, given: Sequence[EncodeInput]) -> Batch:
        encoded = [self.encode(one) for one in given]
        layouts = {name: layout for one in self.encoders for name, layout in one.fields.items()}
        layouts = {name: layout for name, layout in layouts.items() if name in encoded[0]}
        fields: dict[str, Tensor | list[Tensor]] = {}
        for name, layout in layouts.items():
            values = [one[name] for one in encoded]
            fields[name] = torch.stack(values) if layout == "stack" else values
        items = tuple(_item(one, index) for index, one in enumerate(given))
        return Batch(items, (0,) * len(items), fields)

    def part_at(self, sigma: float) -> str:
        """Name of the part that samples at this noise level; the highest part also takes its upper end."""
        parts = self.family.spec.parts(self.family.options)
        inside = [part.name for part in parts if part.sigma_range[0] <= sigma < part.sigma_range[1]]
        return inside[0] if inside else max(parts, key=lambda part: part.sigma_range[1]).name


@torch.no_grad()
def euler_step_error(bench: Bench, reference: Reference, case: Case) -> float:
    """E1: largest error of a step of ours from the pipeline's own points, relative to the length of its
    step.
    """
    given = case.inputs()
    batch = bench.batch(given)
    empty = bench.batch([replace(one, caption="", unconditional=True) for one in given])
    latent = batch["latent"]
    assert isinstance(latent, Tensor)
    walk = reference.walk(given, _normal(tuple(latent.shape), case.seed), case.steps, case.cfg)
    worst = 0.0
    for index, (x, after) in enumerate(zip(walk.points, walk.points[1:])):
        sigma, following = walk.sigmas[index], walk.sigmas[index + 1]
        level, part = torch.full((len(given),), sigma), bench.part_at(sigma)
        velocity = bench.family.predict(bench.modules, part, batch, x, level)
        if case.cfg > 1:
            unguided = bench.family.predict(bench.modules, part, empty, x, level)
            velocity = getattr(reference, "guide", guide)(velocity, unguided, case.cfg)
        ours = x + (following - sigma) * velocity
        error = float((ours - after).norm() / (after - x).norm())
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def guide(velocity: Tensor, unguided: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), as most pipelines do it."""
    return unguided + cfg * (velocity - unguided)


@torch.no_grad()
def encoder_errors(bench: Bench, reference: Reference, given: EncodeInput) -> dict[str, float]:
    """E2: field -> largest absolute difference; infinite where shapes differ or one of the two says
    nothing.
    """
    ours, theirs = bench.encode(given), reference.encode(given)
    errors = {}
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape:
            errors[name] = math.inf
        else:
            error = float((a.float() - b.float()).abs().max())
            errors[name] = error if math.isfinite(error) else math.inf
    return errors


@torch.no_grad()
def batch_error(bench: Bench, case: Case) -> float:
    """E6, the model's part: largest error of a batch's velocities from those of its samples alone, relative
    to them.

    Every sample has a sigma of its own here, which the pipeline, and so E1, cannot ask for.
    """
    given = case.inputs()
    x_t = _normal(tuple(bench.batch(given)["latent"].shape), case.seed)  # type: ignore[union-attr]
    sigma = torch.linspace(0.9, 0.2, len(given))
    part = bench.part_at(float(sigma[0]))
    together = bench.family.predict(bench.modules, part, bench.batch(given), x_t, sigma)
    worst = 0.0
    for i, one in enumerate(given):
        x_one, sigma_one = x_t[i : i + 1], sigma[i : i + 1]
        alone = bench.family.predict(bench.modules, part, bench.batch([one]), x_one, sigma_one)
        worst = max(worst, float((together[i : i + 1] - alone).norm() / alone.norm()))
    return worst if math.isfinite(worst) else math.inf


# -- mutants ------------------------------------------------------------------------------------------------

T = TypeVar("T")
Mutate = Callable[[Family], Family]


@dataclass(frozen=True)
class Mutant:
    """A family with one convention wrong. caught_by: the equality that has to tell.

    tasks: those in which the convention plays a part; empty: all
    """

    caught_by: Literal["E1", "E2"]
    mutate: Mutate
    tasks: tuple[str, ...] = ()


def mutants(own: Mapping[str, Mutant]) -> dict[str, Mutant]:
    """All mutants of a family: those of every family, and its own."""
    return {**GENERAL, **own}


def told(
    mutant: Mutant, family: Family, build: BuildFn, reference: Reference, case: Case, task: str = "t2i"
) -> bool:
    """Whether the equality that has to catch this mutant of the family does."""
    bench = Bench(mutant.mutate(family), build, task)
    if mutant.caught_by == "E1":
        return euler_step_error(bench, reference, case) > E1_TOLERANCE
    return max(encoder_errors(bench, reference, case.inputs()[0]).values()) > E2_TOLERANCE


def method(name: str, wrong: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Mutate:
    """The family with this method replaced; `wrong` is given the right one."""
    return lambda family: with_method(family, name, wrong)


def encoder_method(
    encoder: str, name: str, wrong: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Mutate:
    """The family with this method replaced in the encoder of this name."""

    def encoders(right: Callable[..., Any]) -> Callable[..., Any]:
        return lambda task: [
            with_method(one, name, wrong) if one.name == encoder else one for one in right(task)
        ]

    return method("encoders", encoders)


def with_method(thing: T, name: str, wrong: Callable[[Callable[..., Any]], Callable[..., Any]]) -> T:
    """A copy of the thing with this method replaced; its other methods find the new one."""
    broken = copy.copy(thing)
    setattr(broken, name, wrong(getattr(broken, name)))
    return broken


def _at(change: Callable[[Tensor], Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    return lambda right: (
        lambda modules, part, batch, x_t, sigma: right(modules, part, batch, x_t, change(sigma))
    )


def _exchanged(batch: Batch, x_t: Tensor) -> Batch:
    """Fields that lie on the latent's own grid (a video's first frame) turned as the latent is."""
    fields = {
        name: value.mT
        if isinstance(value, Tensor) and value.dim() >= 4 and value.shape[-2:] == x_t.shape[-2:]
        else value
        for name, value in batch.fields.items()
    }
    return replace(batch, fields=fields)


GENERAL: dict[str, Mutant] = {
    "velocity with the wrong sign": Mutant(
        "E1", method("predict", lambda right: lambda *given: -right(*given))
    ),
    "clock running backwards": Mutant("E1", method("predict", _at(lambda sigma: 1 - sigma))),
    "clock in thousandths": Mutant("E1", method("predict", _at(lambda sigma: sigma * 1000))),
    "rows and columns of the picture exchanged": Mutant(
        "E1",
        method(
            "predict",
            lambda right: (
                lambda modules, part, batch, x_t, sigma: (
                    right(modules, part, _exchanged(batch, x_t), x_t.mT, sigma).mT
                )
            ),
        ),
    ),
}


# -- means --------------------------------------------------------------------------------------------------


def picture(size: Size, seed: int) -> Image.Image:
    """A picture of smooth blobs and fine noise; its channels, rows and columns all differ."""
    numbers = np.random.default_rng(seed)
    small = Image.fromarray(numbers.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((size.width, size.height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = numbers.integers(-20, 21, smooth.shape, dtype=np.int16)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of diffusers and transformers inside: a table of results should stay one."""
    libraries = (diffusers_logging, transformers_logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, before in zip(libraries, shown):
            if before:
                library.enable_progress_bar()


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def _item(given: EncodeInput, index: int) -> Item:
    size = given.size
    assert size is not None
    return Item(f"case-{index}", Path(f"case-{index}.png"), f"case-{index}", given.caption, size, size)
