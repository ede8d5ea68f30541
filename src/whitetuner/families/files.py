"""The files that a model's component is, and what its config.json says. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from whitetuner.errors import UserError


def files_of(component: Path) -> list[Path]:
    """For fingerprints. One, when it is a single file."""
    return [component] if component.is_file() else [path for path in component.iterdir() if path.is_file()]


def read_config(file: Path) -> dict[str, Any]:
    """A config.json; empty when it holds no table. Raises UserError when it cannot be read."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            "{name} cannot be read ({reason})",
            where=str(file),
            mend="download this part of the model again",
            name=file.name,
            reason=error,
        ) from error
    return document if isinstance(document, dict) else {}


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A tensor's name by the first rule (pattern, replacement) that fits; one that none fits stays."""
    for pattern, replacement in rules:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name
