"""The files that a model's component is, for fingerprints."""

from __future__ import annotations

from pathlib import Path


def files_of(component: Path) -> list[Path]:
    """One, when it is a single file."""
    return [component] if component.is_file() else [path for path in component.iterdir() if path.is_file()]
