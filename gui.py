"""`python gui.py` opens the page: the same as `python launch.py gui`, or as `whitetuner gui` where that is installed."""

import importlib.util
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    if importlib.util.find_spec("whitetuner") is None:
        sys.argv[1:1] = ["gui"]
        runpy.run_path(str(Path(__file__).with_name("launch.py")), run_name="__main__")
    else:
        from whitetuner.cli import main

        sys.exit(main(["gui", *sys.argv[1:]]))
