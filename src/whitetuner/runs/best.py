"""The best checkpoint of a run: the saved step whose loss on held-out pictures is the least. Nothing here needs torch.

Each checkpoint tells the loss that was measured at its step in its own training_state.json, which is written with it: so
a kill at any moment leaves nothing to mend, and commands, report, page and rotation find the same one.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whitetuner.runs.files import write_atomically

#: The document that makes a folder a checkpoint, and its key for the loss; null where none was measured at that step.
STATE_FILE = "training_state.json"
HELD_OUT_LOSS = "held_out_loss"
#: Beside the checkpoints, for people and scripts: written anew with each checkpoint, and when a run goes on.
POINTER = "best.json"


@dataclass(frozen=True)
class Measured:
    """A checkpoint with its held-out loss."""

    step: int
    loss: float
    path: Path


def measured(checkpoints: Path, run_id: str) -> list[Measured]:
    """The run's checkpoints that know their held-out loss, the best first; of equals the earlier one.

    The folder may come from anybody: what cannot be read, or is of another run, is none of them.
    """
    found = []
    for path in checkpoints.glob("checkpoint-*") if checkpoints.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d{1,15})", path.name)
        state = state_of(path) if match else {}
        loss = state.get(HELD_OUT_LOSS)
        if match and isinstance(loss, float) and math.isfinite(loss) and state.get("run_id") == run_id:
            found.append(Measured(int(match[1]), loss, path))
    return sorted(found, key=lambda one: (one.loss, one.step))


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Its state document, unchecked; empty where there is none."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def point_at_best(checkpoints: Path, run_id: str) -> None:
    """Writes best.json, or takes it away where no checkpoint was measured. Raises OSError when the disk does not take it."""
    best = next(iter(measured(checkpoints, run_id)), None)
    if best is None:
        (checkpoints / POINTER).unlink(missing_ok=True)
        return
    facts = {"step": best.step, "path": best.path.name, HELD_OUT_LOSS: best.loss}
    write_atomically(checkpoints / POINTER, json.dumps(facts, indent=1))
