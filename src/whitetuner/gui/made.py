"""Things to try a form with: a random tiny model, a small data set. A child process makes them, since both are slow to load."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.families import registry
from whitetuner.gui.pickers import Roots
from whitetuner.paths import PYTHON
from whitetuner.tongue import VARIABLE

#: Tiny models train at this size (docs/cli.md, `tiny`).
TINY_SIZE_PX = 64
#: A child that has not made a few small files by then hangs.
_PATIENCE_S = 300
_KIND = {"t2i": "t2i", "edit": "edit", "i2v": "video", "t2v": "video"}


def tiny_model(
    family: str, task: str, roots: Roots, chosen: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """(folder, what the form's controls then hold). One that is there already is used again. Raises UserError.

    chosen: the variant that the form says; the first for the task where it is none or for another one
    """
    spec = registry.spec(family)
    fitting = [one for one in spec.variants if spec.variant_tasks and task in spec.tasks_of(one)]
    variant = chosen if chosen in fitting else next((one for one, of in spec.pairs() if of == task), None)
    name = f"tiny-{family}-{variant}" if variant else f"tiny-{family}"
    folder = _place(roots) / name
    if not (folder / "model_index.json").is_file():
        run_word(["tiny", family, str(folder), *(["--variant", variant] if variant else [])])
    options = {f"model.options.{key}": str(value) for key, value in spec.tiny_options.items()}
    if variant and "variant" in spec.options.model_fields and spec.variant_tasks:
        options["model.options.variant"] = variant
    frames = {"data.num_frames": "5"} if spec.frames else {}
    return folder, {
        "model.path": str(folder),
        **options,
        **frames,
        "data.resolution": str(TINY_SIZE_PX),
        "method.factor": "4",
    }


def sample_data(task: str, roots: Roots) -> tuple[Path, dict[str, Any]]:
    """(folder, what the form's controls then hold). Raises UserError."""
    kind = _KIND[task]
    folder = _place(roots) / f"sample-{kind}"
    if not folder.is_dir() or not any(folder.iterdir()):
        run_word(["testdata", kind, str(folder)])
    if kind == "edit":
        conditions = [str(one) for one in sorted(folder.glob("condition*")) if one.is_dir()]
        return folder, {"data.target": str(folder / "target"), "data.conditions": "\n".join(conditions)}
    return folder, {"data.videos" if kind == "video" else "data.images": str(folder)}


def run_word(arguments: list[str]) -> str:
    """Runs a word of the command line; returns what it printed. Raises UserError with what it said when it fails."""
    try:
        done = subprocess.run(
            [*PYTHON, "-m", "whitetuner", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=child_environment(),
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            "it is not ready after {seconds} s",
            where=f"whitetuner {arguments[0]}",
            mend="try it in a terminal to see all of it",
            code=EXIT_FAILED,
            seconds=_PATIENCE_S,
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.strip().split("\n") if line]
        raise UserError(
            "it could not be made: {reason}",
            where=f"whitetuner {arguments[0]}",
            mend="try it in a terminal to see all of it",
            code=EXIT_FAILED,
            reason=" ".join(lines[-2:]).removeprefix("error: ")[:500],
        )
    return done.stdout


def child_environment() -> dict[str, str]:
    """For a child whose words are read here: this very package, wherever it is started from, English and UTF-8."""
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONIOENCODING": "utf-8", VARIABLE: "en"}


def _place(roots: Roots) -> Path:
    """Where trying out happens: output/try, inside of the roots where there are any."""
    base = Path.cwd() if roots.folders is None or roots.allows(Path.cwd()) else roots.folders[0]
    return base / "output" / "try"
