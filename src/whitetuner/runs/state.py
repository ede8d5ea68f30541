"""What is kept for this user on this machine, beside the runs: which runs there are, who waits, who holds a GPU."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

#: Environment variable that puts the folder elsewhere (a shared home without file locks, tests).
STATE_VARIABLE = "WHITETUNER_STATE"


def state_folder() -> Path:
    """The folder, not made yet. On a system with shared homes, locks between machines would be wrong: set WHITETUNER_STATE."""
    given = os.environ.get(STATE_VARIABLE)
    if given:
        return Path(given)
    home = Path.home()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local") / "whitetuner" / "state"
    if sys.platform == "darwin":
        return home / "Library/Application Support/whitetuner/state"
    return Path(os.environ.get("XDG_STATE_HOME") or home / ".local/state") / "whitetuner"


def machine_secret() -> bytes:
    """32 random bytes of this user, made once; they seal the page's logins."""
    path = state_folder() / "secret"
    try:
        found = bytes.fromhex(path.read_text(encoding="utf-8"))
        if len(found) == 32:
            return found
    except (OSError, ValueError):
        pass  # not there yet, or torn: a new one only ends old logins
    made = secrets.token_bytes(32)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".secret.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.touch(mode=0o600, exist_ok=False)  # not to be read by others, not even for a moment
    beside.write_text(made.hex(), encoding="utf-8")
    beside.replace(path)
    return made
