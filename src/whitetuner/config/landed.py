"""Options whose feature is not there yet are refused, by name, instead of being read and ignored.

A feature that lands takes its line out of the tables below, nothing else.
"""

from __future__ import annotations

from typing import Any

from whitetuner.config.schema import Config
from whitetuner.config.told import field_of
from whitetuner.errors import UserError, UserErrors

#: Option -> (values that work today besides its default, the feature that other values ask for).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {}


def not_landed() -> dict[str, tuple[Any, ...]]:
    """Every option that is refused today -> the values besides its default that work."""
    return {key: works for key, (works, _) in _REFUSED.items()}


def refuse_not_landed(config: Config) -> None:
    """Raises UserError(s) naming every option asked for whose feature is not there yet."""
    errors = []
    for key, (works, feature) in _REFUSED.items():
        field = field_of(key)
        assert field is not None, f"{key} left the schema"
        default = field.get_default(call_default_factory=True)
        for place, value in _values(config, key):
            if value != default and value not in works:
                errors.append(
                    UserError(
                        "{value} asks for {feature}, which is not there yet",
                        where=place,
                        mend="leave it out; the support table in README.md says what works",
                        value=value,
                        feature=feature,
                    )
                )
    if errors:
        raise UserErrors(errors) if len(errors) > 1 else errors[0]


def _values(config: Config, key: str) -> list[tuple[str, Any]]:
    """(dotted key, value) of an option, in every place where it may stand."""
    section, *inner = key.split(".")
    table = getattr(config, section)
    if len(inner) == 2:  # preview.prompts.images
        rows = enumerate(getattr(table, inner[0]))
        return [(f"{section}.{inner[0]}[{index}].{inner[1]}", getattr(row, inner[1])) for index, row in rows]
    found = [(key, getattr(table, inner[0]))]
    if section == "data":
        found += [
            (f"data.sets[{index}].{inner[0]}", getattr(one, inner[0]))
            for index, one in enumerate(config.data.sets)
        ]
    return found
