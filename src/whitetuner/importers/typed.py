"""The command line of a training in a shell's or batch file."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath
from typing import Any

#: musubi-tuner's wan_train_network.py, kohya's and the original's zimage_trainer.py.
_SCRIPT = re.compile(r"(_train(_network)?|trainer)(\.py)?(?=\s|$|\")")


def command_line(text: str) -> dict[str, Any] | None:
    """The arguments of a call of a training script in a shell's or batch file's text; None when there is none."""
    joined = re.sub(r"[\\^`]\s*\n", " ", text)
    line = next((one for one in joined.splitlines() if _SCRIPT.search(one)), None)
    if line is None:
        return None
    words = shlex.split(line.replace("\\", "/"), comments=True)
    script = next((word for word in words if _SCRIPT.search(word)), "")
    found: dict[str, Any] = {"script": PurePosixPath(script).name}
    name = ""
    for word in words[words.index(script) + 1 :] if script else []:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name] = value or True
        elif name:
            before = found[name]
            found[name] = (
                word if before is True else [*(before if isinstance(before, list) else [before]), word]
            )
    return found
