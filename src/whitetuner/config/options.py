"""The families as the config sees them: their facts and the schema of [model.options]. No torch: only `spec.py` is read."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from whitetuner.family import FamilySpec, Options

# By name: the schema stands a floor below the families, which describe themselves with words of this floor.
_REGISTRY = "whitetuner.families.registry"


def families() -> tuple[str, ...]:
    """Names of all families."""
    return tuple(import_module(_REGISTRY).FAMILIES)


def spec_of(family: str) -> FamilySpec:
    """The family's facts. Raises UserError with the known names."""
    return import_module(_REGISTRY).spec(family)


def options_of(family: str, given: Mapping[str, Any]) -> Options:
    """The options object. Raises pydantic's ValidationError with the key's name."""
    return spec_of(family).options(**given)
