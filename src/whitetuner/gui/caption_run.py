"""Captions written by a model of the user's: `whitetuner caption` as a child, whose lines the data page shows as they come."""

from __future__ import annotations

import subprocess
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whitetuner.errors import UserError
from whitetuner.gui.made import child_environment
from whitetuner.gui.told import translated
from whitetuner.paths import PYTHON

#: Lines of the child that are remembered, and the longest instruction.
_LINES, _LONGEST = 400, 2000


@dataclass
class _Child:
    process: subprocess.Popen[str]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))


class CaptionRuns:
    """One at a time: it fills the card."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def start(
        self,
        folder: Path,
        model: Path,
        ending: str,
        *,
        instruction: str,
        trigger: str,
        recursive: bool,
        most: int | None,
    ) -> None:
        """Captions that are missing in a folder; what is there stays. most: so many, to try. Raises UserError."""
        if len(instruction) > _LONGEST or len(trigger) > _LONGEST:
            raise UserError("the caption is too long", mend="use at most {limit} characters", limit=_LONGEST)
        # Each value is one word of the list and stands behind "=": none is taken for an option, none reaches a shell.
        command = [
            *PYTHON,
            "-m",
            "whitetuner",
            "caption",
            str(folder),
            f"--model={model}",
            f"--ext={ending}",
        ]
        command += [f"--instruction={instruction}"] if instruction.strip() else []
        command += [f"--trigger={trigger.strip()}"] if trigger.strip() else []
        command += ["--recursive"] if recursive else []
        command += [f"--most={most}"] if most is not None else []
        with self._lock:
            if self._child is not None and self._child.process.poll() is None:
                raise UserError("captions are being written already", mend="wait, or stop that first")
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env=child_environment(),
            )
            self._child = _Child(process)
            threading.Thread(target=_listen, args=(self._child,), daemon=True).start()

    def stop(self) -> None:
        """Ends it between two pictures or within one; captions are whole or not there."""
        with self._lock:
            if self._child is not None:
                self._child.process.terminate()

    def state(self, language: str) -> dict[str, Any]:
        """running; lines; code: how it ended, None while it goes on or when there was none."""
        child = self._child
        if child is None:
            return {"running": False, "lines": [], "code": None}
        code = child.process.poll()
        text = "\n".join(list(child.lines)[-40:])
        return {"running": code is None, "lines": translated(text, language).split("\n"), "code": code}


def _listen(child: _Child) -> None:
    """The pipe is read to its end, so that the child never waits for a page."""
    assert child.process.stdout is not None
    for line in child.process.stdout:
        child.lines.append(line.rstrip("\n"))
    child.process.wait()
