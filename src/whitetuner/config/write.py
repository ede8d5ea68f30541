"""A Config -> TOML that gives the same Config again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomlkit

from whitetuner.config.migrate import FORMAT, KEY
from whitetuner.config.schema import Config


def dump_config(config: Config) -> str:
    """Every value as TOML, defaults too, so that a later version with other defaults trains the same.

    Entries of [[data.sets]] hold only what they say themselves: what they leave out comes from [data].
    """
    values = config.model_dump(mode="json")
    values["data"]["sets"] = [one.model_dump(mode="json", exclude_unset=True) for one in config.data.sets]
    return tomlkit.dumps({KEY: FORMAT, **_plain(values)})


def toml_value(value: Any) -> str:
    """A value as it stands in a TOML file; paths with backslashes in single quotes."""
    return tomlkit.item(_plain(value)).as_string()


def _plain(value: Any, inside_set: bool = False) -> Any:
    """TOML has no null: what is unset is left out. Empty lists and tables are, too, except where they override."""
    if isinstance(value, Mapping):
        return {
            key: _plain(one, inside_set or key == "sets")
            for key, one in value.items()
            if one is not None and (inside_set or one not in ([], {}))
        }
    if isinstance(value, (list, tuple)):
        return [_plain(one, inside_set) for one in value]
    if isinstance(value, str) and "\\" in value and "'" not in value and value.isprintable():
        return tomlkit.string(value, literal=True)
    return value
