"""`python -m whitetuner.gui.dialog folder|file START`: one native dialog, the choice printed. A process of its own, since
the toolkit wants the main thread and must not outlive its window."""

from __future__ import annotations

import sys
import tkinter
from tkinter import filedialog


def main(wants: str, start: str) -> str:
    """The chosen path, "" when the dialog was closed."""
    window = tkinter.Tk()
    window.withdraw()
    window.attributes("-topmost", True)
    chosen = (
        filedialog.askopenfilename(initialdir=start)
        if wants == "file"
        else filedialog.askdirectory(initialdir=start)
    )
    window.destroy()
    return chosen or ""


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    print(main(sys.argv[1], sys.argv[2]))
