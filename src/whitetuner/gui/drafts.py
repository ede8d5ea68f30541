"""What was last on a tab's form, kept on the server, and the user's own presets: TOML files that anyone can read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.runs.files import write_atomically

#: Larger texts are no config.
LARGEST_BYTES = 1_000_000


@dataclass(frozen=True)
class Drafts:
    """folder: the page's own, outside of every run and data set."""

    folder: Path

    def draft(self, tab: str) -> str | None:
        """The text last seen on a tab; None when there is none, or none that can be read."""
        return _read(self.folder / "drafts" / f"{_plain(tab)}.toml")

    def keep(self, tab: str, text: str) -> None:
        """Raises UserError when it cannot be written."""
        _write(self.folder / "drafts" / f"{_plain(tab)}.toml", text)

    def presets(self) -> dict[str, str]:
        """The user's own presets: name -> text."""
        files = sorted((self.folder / "presets").glob("*.toml"))
        texts = {one.stem: _read(one) for one in files}
        return {name: text for name, text in texts.items() if text is not None}

    def keep_preset(self, name: str, text: str) -> str:
        """Writes a preset (one of the same name is replaced); returns its name. Raises UserError."""
        plain = _plain(name)
        if not plain:
            raise UserError("a preset needs a name", mend="use letters, numbers, blanks or -")
        _write(self.folder / "presets" / f"{plain}.toml", text)
        return plain

    def drop_preset(self, name: str) -> None:
        (self.folder / "presets" / f"{_plain(name)}.toml").unlink(missing_ok=True)


def _plain(name: str) -> str:
    """Letters of any script, numbers, blanks, - and _: usable as a file name everywhere."""
    return re.sub(r"[^\w -]", "", name, flags=re.UNICODE).strip()[:60]


def _read(path: Path) -> str | None:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _write(path: Path, text: str) -> None:
    if len(text.encode("utf-8", "replace")) > LARGEST_BYTES:
        raise UserError("the text is too long for a config", mend="shorten it")
    try:
        write_atomically(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(
            "the draft cannot be kept ({reason})",
            where=str(path),
            mend="make room, or mend the folder's rights",
            code=EXIT_ENVIRONMENT,
            reason=error.strerror or error,
        ) from error
