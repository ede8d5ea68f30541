"""Which families there are: one line each. Facts are read without torch; a model's code is imported when it is used."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from whitetuner.errors import UserError
from whitetuner.family import WISHES, Family, FamilySpec, KeyMap, ModelPaths, Options
from whitetuner.records import Size

if TYPE_CHECKING:
    from whitetuner.families.contract import Mutant, OriginalReader, Reference
    from whitetuner.family import Sketch

#: File in a model folder whose weights are random; runs over it say so.
RANDOM_MARK = "RANDOM_WEIGHTS.txt"
#: Tiny models draw and train at this size; pictures have one frame.
TINY_SIZE = Size(64, 64, 5)

FAMILIES: dict[str, str] = {
    "flux2-klein": "whitetuner.families.flux2_klein",
    "zimage": "whitetuner.families.zimage",
    "zimage-v2": "whitetuner.families.zimage_v2",
    "qwen-image": "whitetuner.families.qwen_image",
    "wan": "whitetuner.families.wan",
    "glm-image": "whitetuner.families.glm_image",
}


def spec(name: str) -> FamilySpec:
    """Facts of a family. Raises UserError with the known names."""
    if name not in FAMILIES:
        raise UserError(
            "there is no model family '{name}'",
            where="model.family",
            mend="use one of: {known}",
            name=name,
            known=", ".join(FAMILIES),
        )
    return import_module(f"{FAMILIES[name]}.spec").SPEC


def load(name: str, options: Options, paths: ModelPaths) -> Family:
    """The family's model class with options and paths; nothing is read from disk yet. Imports torch."""
    spec(name)
    return import_module(f"{FAMILIES[name]}.model").Model(options, paths)


def keys(name: str) -> KeyMap:
    """The family's key map alone."""
    spec(name)
    return import_module(f"{FAMILIES[name]}.keys").KEYS


def keymaps() -> dict[str, KeyMap]:
    """Every family's key map: what a file is told with."""
    return {name: keys(name) for name in FAMILIES}


def sketch(name: str) -> Sketch:
    """What the plan needs of the family without its files. Imports torch."""
    spec(name)
    found: Sketch = import_module(f"{FAMILIES[name]}.sketch")
    return found


def make_tiny(name: str, folder: str, variant: str | None = None, seed: int = 0) -> None:
    """Writes a random tiny model of the family as a diffusers folder; equal seeds, equal numbers. Imports torch.

    variant: None: the family's first. Raises UserError for an unknown variant or a folder in use.
    """
    facts, target = spec(name), Path(folder)
    variant = next(iter(facts.variants)) if variant is None else variant
    if variant not in facts.variants:
        raise UserError(
            "{title} has no variant '{variant}'",
            where="--variant",
            mend="use one of: {known}",
            title=facts.title,
            variant=variant,
            known=", ".join(facts.variants),
        )
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError("{path} is not empty", where="DIR", mend="give a new or empty folder", path=target)
    from whitetuner.families.tiny_parts import seeded

    make = import_module(f"{FAMILIES[name]}.tiny").make
    with seeded(seed):
        make(target, variant)
    size = TINY_SIZE if facts.frames else TINY_SIZE._replace(frames=1)
    wishes = {"options": dict(facts.tiny_options), "size": list(size)}
    (target / WISHES).write_text(json.dumps(wishes, indent=1) + "\n", encoding="utf-8")
    (target / RANDOM_MARK).write_text(
        "The weights of this model are random: it draws noise.\n", encoding="utf-8"
    )


def reference(name: str, folder: Path, options: Options) -> Reference:
    """The family's diffusers pipeline, loaded whole from a model folder: what our code is compared with."""
    spec(name)
    return import_module(f"{FAMILIES[name]}.reference").Reference(folder, options)


def original_reader(name: str) -> OriginalReader | None:
    """How diffusers reads the family's original layout; None where no program but ours has one. Imports torch."""
    spec(name)
    return getattr(import_module(f"{FAMILIES[name]}.reference"), "READS_ORIGINAL", None)


def mutants(name: str) -> dict[str, Mutant]:
    """The family with one convention wrong at a time: those of every family and its own."""
    from whitetuner.families import contract

    spec(name)
    return contract.mutants(import_module(f"{FAMILIES[name]}.mutants").MUTANTS)
