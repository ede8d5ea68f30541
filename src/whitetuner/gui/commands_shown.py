"""What to type instead of using the form: the same run from a terminal."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from whitetuner.config.document import parse
from whitetuner.gui.document import NAME, inner_value, set_arguments
from whitetuner.gui.training_tabs import Tab


def commands(text: str, tab: Tab) -> dict[str, Any]:
    """file: a name for the config; run: commands over that file; sets: the document as --set. Raises UserError."""
    name = inner_value(parse(text, NAME), "run.name")
    file = f"{name if isinstance(name, str) and name else tab.key}.toml"
    return {
        "file": file,
        "run": [_line(["python", "launch.py", word, file]) for word in ("check", "train")],
        "sets": [_line(["--set", one]) for one in set_arguments(text)],
    }


def _line(words: Sequence[str]) -> str:
    """Quoted for the shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
