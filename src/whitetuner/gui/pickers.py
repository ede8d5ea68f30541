"""Files and folders for the page: which may be looked at, what a pasted path means, what a folder holds, native dialogs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from whitetuner.data.media import PICTURES
from whitetuner.errors import UserError
from whitetuner.paths import PYTHON

#: Entries of a folder that are shown; a folder of a hundred thousand pictures must not become a page.
LISTED = 500
#: A native dialog is taken down when nobody answers it for so long.
DIALOG_S = 600
Wants = Literal["folder", "file", "any"]


@dataclass(frozen=True)
class Roots:
    """Where the page may look. folders: None: everywhere (the user at this machine); native: dialogs may open here."""

    folders: tuple[Path, ...] | None = None
    native: bool = False

    @classmethod
    def of(cls, folders: Sequence[str | Path] | None, *, native: bool = False) -> Roots:
        return cls(
            None if folders is None else tuple(Path(one).expanduser().resolve() for one in folders), native
        )

    def path(self, text: str) -> Path:
        """The place that a text means, links followed. Raises UserError when it lies outside of the folders."""
        given = cleaned(text)
        if not given or "\0" in given:
            raise UserError("no path is given", mend="choose a folder")
        try:
            path = Path(given).expanduser().resolve()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                path.lstat()  # raises for a name that is longer than this system takes
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: half a character
            raise UserError(
                "{path} is no path ({reason})", mend="choose a folder", path=given, reason=error
            ) from error
        if not self.allows(path):
            assert self.folders is not None
            raise UserError(
                "{path} lies outside of the folders that this page may use",
                mend="choose one inside of: {folders}",
                path=given,
                folders=", ".join(map(str, self.folders)),
            )
        return path

    def allows(self, path: Path) -> bool:
        """Whether a path lies inside, its links followed."""
        if self.folders is None:
            return True
        real = Path(os.path.realpath(path))
        return any(real == root or real.is_relative_to(root) for root in self.folders)

    def tops(self) -> list[Path]:
        """Where looking begins: the folders, or home, here and the drives."""
        if self.folders is not None:
            return list(self.folders)
        drives = (
            [Path(f"{letter}:\\") for letter in string.ascii_uppercase] if os.name == "nt" else [Path("/")]
        )
        places = [Path.cwd(), Path.home(), *(drive for drive in drives if drive.exists())]
        return list(dict.fromkeys(places))


def cleaned(text: str) -> str:
    """A pasted path without what programs put around it: blanks, quotes of all kinds, file://, invisible marks.

    Explorer's "copy as path" gives "C:\\x y"; a terminal gives 'x y' or x\\ y; browsers give file:///C:/x%20y.
    """
    text = re.sub("[\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]", "", text).strip()
    for opening, closing in ('""', "''", "“”", "‘’", "「」", "``"):
        if len(text) > 1 and text[0] == opening and text[-1] == closing:
            text = text[1:-1].strip()
    if text.lower().startswith("file://"):
        text = unquote(urlsplit(text).path)
        text = re.sub(r"^/([A-Za-z]:)", r"\1", text)
    if os.name != "nt" and "\\ " in text:
        text = re.sub(r"\\([ ()&'])", r"\1", text)
    return text


def listing(roots: Roots, text: str) -> dict[str, Any]:
    """What a folder holds, folders first, for the page's own browser. Raises UserError.

    Keys: path, parent (None at a root), folders, files ([name, bytes]), pictures (how many), more (not shown), tops.
    """
    path = roots.path(text) if text.strip() else roots.tops()[0].resolve()
    while not _is_dir(path) and path != path.parent:
        path = path.parent
    if not roots.allows(path):
        path = roots.tops()[0]
    try:
        with os.scandir(path) as entries:
            found = sorted(
                (one for one in entries if not one.name.startswith(".")), key=lambda one: _natural(one.name)
            )
    except OSError as error:
        raise UserError(
            "the folder may not be read",
            where=str(path),
            mend="give yourself the right to read it ({reason})",
            reason=error.strerror or error,
        ) from error
    folders = [one.name for one in found if _is_dir(one) and roots.allows(Path(one.path))]
    files = [one for one in found if not _is_dir(one) and roots.allows(Path(one.path))]
    room = max(0, LISTED - len(folders))
    parent = path.parent
    return {
        "path": str(path),
        "parent": str(parent) if parent != path and roots.allows(parent) else None,
        "folders": folders[:LISTED],
        "files": [[one.name, _bytes(one)] for one in files[:room]],
        "pictures": sum(one.name.lower().endswith(PICTURES) for one in files),
        "more": max(0, len(folders) - LISTED) + max(0, len(files) - room),
        "tops": [str(one) for one in roots.tops()],
        "separator": os.sep,
    }


def can_ask() -> bool:
    """Whether a dialog of this machine can be shown: a desktop is there, and what draws it."""
    if sys.platform == "win32":  # python.org's embeddable Python has no tkinter
        return importlib.util.find_spec("tkinter") is not None
    if sys.platform == "darwin":
        return True
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    return shutil.which("zenity") is not None or shutil.which("kdialog") is not None


def ask(wants: Wants, start: str) -> str:
    """The place chosen in a dialog of this machine; "" when it was closed. Blocks; a child process draws it.

    Raises UserError when no dialog can be shown.
    """
    try:
        begin = str(Roots().path(start))
    except UserError:
        begin = ""
    begin = begin if begin and Path(begin).exists() else str(Path.cwd())
    command = _dialog(wants, begin)
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=DIALOG_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            "no dialog can be shown here ({reason})",
            mend="paste the path, or use the page's own list",
            reason=error,
        ) from error
    return cleaned(done.stdout) if done.returncode == 0 else ""


def _dialog(wants: Wants, start: str) -> list[str]:
    """The command that draws the dialog and prints the choice. The start is an argument, never part of a script."""
    if sys.platform == "darwin":
        kind = "choose file" if wants == "file" else "choose folder"
        script = (
            f"on run argv\nPOSIX path of ({kind} default location (POSIX file (item 1 of argv)))\nend run"
        )
        return ["osascript", "-e", script, start]
    if os.name == "nt":
        return [*PYTHON, "-m", "whitetuner.gui.dialog", "file" if wants == "file" else "folder", start]
    if shutil.which("zenity"):
        folder = [] if wants == "file" else ["--directory"]
        return ["zenity", "--file-selection", *folder, f"--filename={start}/"]
    return ["kdialog", "--getopenfilename" if wants == "file" else "--getexistingdirectory", start]


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """cat2 before cat10, small and capital letters alike."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(one), "") if one.isdigit() else (1, 0, one) for one in parts], name


def _is_dir(entry: os.DirEntry[str] | Path) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _bytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0
