"""[model.options]: the family's own settings, checked against the family's schema. No torch: only `spec.py` is read."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from whitetuner.family import FamilySpec, Options


def spec_of(family: str) -> FamilySpec:
    """The family's facts. Raises UserError with the known names."""
    # By name: the schema stands below the families, which describe themselves with it.
    return import_module("whitetuner.families.registry").spec(family)


def options_of(family: str, given: Mapping[str, Any]) -> Options:
    """The options object. Raises pydantic's ValidationError with the key's name."""
    return spec_of(family).options(**given)


__all__ = ["ValidationError", "options_of", "spec_of"]
