"""Every option of the schema changes something or is refused: one that nobody reads would be a lie."""

from __future__ import annotations

import ast
from pathlib import Path

from whitetuner.config.landed import not_landed
from whitetuner.config.schema import Config, DataSet, Prompt

SOURCE = Path(__file__).parents[2] / "src" / "whitetuner"


def read_names() -> set[str]:
    """Attribute names that are read, and string constants, in all code outside config/ and nano/."""
    found: set[str] = set()
    for file in SOURCE.rglob("*.py"):
        if file.relative_to(SOURCE).parts[0] in ("config", "nano"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def options() -> dict[str, str]:
    """Dotted key -> name of every option."""
    found = {}
    for section, info in Config.model_fields.items():
        for name in info.annotation.model_fields:  # type: ignore[union-attr]
            found[f"{section}.{name}"] = name
    found.update({f"data.sets.{name}": name for name in DataSet.model_fields})
    found.update({f"preview.prompts.{name}": name for name in Prompt.model_fields})
    return found


def test_every_option_is_read_or_refused() -> None:
    read, refused = read_names(), not_landed()
    unused = [
        key
        for key, name in options().items()
        if name not in read and key not in refused and key.replace("data.sets.", "data.") not in refused
    ]
    assert unused == []


def test_what_is_refused_exists() -> None:
    assert set(not_landed()) <= set(options())
