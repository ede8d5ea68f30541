"""A family over a random tiny model, with everything loaded once, when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from whitetuner.families import registry
from whitetuner.families.contract import Bench, Case, Reference
from whitetuner.family import Family, FamilySpec, ModelPaths, Options
from whitetuner.records import Size

CAPTIONS = (
    "a red circle",
    "两只猫 on a \"wall\" 🐱, 'says hello'",
    "",
    "a very long walk through the town " * 20,
)


def plain_build(cls: type, folder: Path, *, keep_precise: Sequence[str] = ()) -> Any:
    """The libraries' own loading in float32: the tests of the memory engine are elsewhere."""
    return cls.from_pretrained(folder).float().eval().requires_grad_(False)  # type: ignore[attr-defined]


@dataclass
class Subject:
    """A family and a task of it over a tiny model. variant: which one lies in the folder; "": the first."""

    name: str
    task: str
    folder: Path
    variant: str = ""

    @cached_property
    def spec(self) -> FamilySpec:
        return registry.spec(self.name)

    @cached_property
    def options(self) -> Options:
        return self.spec.options(**self.spec.tiny_options)

    @cached_property
    def family(self) -> Family:
        return registry.load(self.name, self.options, ModelPaths(self.folder))

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.family, plain_build, self.task)

    @cached_property
    def reference(self) -> Reference:
        return registry.reference(self.name, self.folder, self.options)

    def size(self, columns: int = 4, rows: int = 4) -> Size:
        """So many strides wide and high."""
        stride = self.family.stride()
        return Size(columns * stride, rows * stride, 2 * self.spec.frames + 1 if self.spec.frames else 1)

    def case(self, *captions: str, columns: int = 4, rows: int = 4, **more: Any) -> Case:
        conditions = (self.size(5, 4), self.size(4, 6)) if self.task == "edit" else ()
        conditions = conditions[: self.spec.most_references.get(self.variant, len(conditions))]
        if self.task == "i2v":
            conditions = (self.size(columns, rows)._replace(frames=1),)
        return Case(captions or CAPTIONS[:1], self.size(columns, rows), condition_sizes=conditions, **more)
