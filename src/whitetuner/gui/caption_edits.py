"""Captions that are changed on the page: written whole, what was there before kept aside, one step back at a time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from threading import Lock

from whitetuner.data.captions import guess_encoding, tidy
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.runs.files import write_atomically

#: Steps back that are kept for each caption, and the longest caption that is taken.
STEPS, LONGEST = 50, 20_000


class CaptionEdits:
    """folder: the page's own, outside of every data set; a file for each caption with what it said before, oldest first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = Lock()

    def write(self, path: Path, text: str, before: str | None) -> str:
        """Puts a text into a caption file; returns what it holds then.

        before: what the page showed, None for no file. Raises UserError when the file says something else by now, and when it
        cannot be written.
        """
        if len(text) > LONGEST:
            raise UserError("the caption is too long", mend="use at most {limit} characters", limit=LONGEST)
        with self._lock:
            raw = _bytes(path)
            if raw is not None and tidy(text_of_bytes(raw)) != tidy(before or ""):
                raise UserError(
                    "the caption file was changed by another program",
                    where=str(path),
                    mend="look again, then change it",
                )
            wanted = tidy(text)
            if raw is not None and tidy(text_of_bytes(raw)) == wanted:
                return wanted
            self._push(path, raw)
            _put(path, (wanted + "\n").encode("utf-8", "replace"))
            return wanted

    def undo(self, path: Path) -> str | None:
        """What the caption says after one step back; None: there is no file again. Raises UserError when there is no step."""
        with self._lock:
            steps = self._steps(path)
            if not steps:
                raise UserError("there is nothing to undo", where=str(path))
            raw = None if steps[-1] is None else bytes.fromhex(steps[-1])
            if raw is None:
                path.unlink(missing_ok=True)  # it was made here: before the change there was none
            else:
                _put(path, raw)
            write_atomically(self._file(path), json.dumps(steps[:-1]))
            return None if raw is None else tidy(text_of_bytes(raw))

    def changed(self, path: Path) -> bool:
        return bool(self._steps(path))

    def _push(self, path: Path, raw: bytes | None) -> None:
        steps = [*self._steps(path), None if raw is None else raw.hex()]
        write_atomically(self._file(path), json.dumps(steps[-STEPS:]))

    def _steps(self, path: Path) -> list[str | None]:
        try:
            found = json.loads(self._file(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return found if isinstance(found, list) else []

    def _file(self, path: Path) -> Path:
        name = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self.folder / "captions" / f"{name}.json"


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            "the caption cannot be read ({reason})", where=str(path), mend="mend its rights", reason=error
        ) from error


def text_of_bytes(raw: bytes) -> str:
    """A caption file's text, in the encoding that it probably has."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode(guess_encoding(raw), "replace")


def _put(path: Path, raw: bytes) -> None:
    try:
        write_atomically(path, raw)
    except OSError as error:
        raise UserError(
            "the caption cannot be written ({reason})",
            where=str(path),
            mend="mend the folder's rights, or make room on the disk",
            code=EXIT_ENVIRONMENT,
            reason=error.strerror or error,
        ) from error
