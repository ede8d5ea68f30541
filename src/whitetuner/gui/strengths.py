"""One prompt of a finished run at several strengths of its adapter, drawn by `whitetuner sample` in a process of its own.

`python -m whitetuner.gui.strengths RUN NUMBER` is that process: it waits for a free device as a training does, since a picture
needs the whole model on the card.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from whitetuner.config.load import load_config
from whitetuner.config.schema import Config
from whitetuner.errors import UserError
from whitetuner.paths import PYTHON
from whitetuner.runs.devices import Held, devices, wish_of
from whitetuner.runs.files import write_atomically
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.jobs import Job
from whitetuner.runs.start import detached

#: In percent; 0 is the model as it was.
PERCENTS = (0, 40, 60, 80, 100, 120)
_LOOK_EVERY_S = 1.0


def begin(job: Job, number: int) -> None:
    """Starts drawing prompt `number` of the run's previews. Raises UserError without a final file, or while it draws already."""
    folder = RunFolder(Path(job.run))
    config = _config(folder)
    prompts = config.preview.prompts
    if not 0 <= number < len(prompts):
        raise UserError("this run has no such prompt", mend="choose one of its previews")
    if config.method.kind == "full":
        raise UserError(
            "a whole model has no strength: it is what it learned",
            mend="look at the run's previews, or draw with `whitetuner sample`",
        )
    folder.final_adapter(config.method.kind)
    if found(folder)["drawing"]:
        raise UserError("the strengths are being drawn already", mend="wait until they are there")
    place = _place(folder)
    place.mkdir(parents=True, exist_ok=True)
    for old in place.glob("*.png"):
        old.unlink()
    log = folder.logs / "strengths.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        command = [*PYTHON, "-m", "whitetuner.gui.strengths", job.run, str(number)]
        process = detached(command, Path(job.cwd), output, log)
    state = {
        "prompt": prompts[number].text,
        "pid": process.pid,
        "born": psutil.Process(process.pid).create_time(),
    }
    write_atomically(place / "state.json", json.dumps(state))


def found(folder: RunFolder) -> dict[str, Any]:
    """{prompt, percents: those that are there, drawing: whether more will come}."""
    place = _place(folder)
    try:
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        prompt, drawing = str(state["prompt"]), _lives(int(state["pid"]), float(state["born"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):  # anybody's folder
        return {"prompt": "", "percents": [], "drawing": False}
    there = [percent for percent in PERCENTS if picture(folder, percent).is_file()]
    return {"prompt": prompt, "percents": there, "drawing": drawing}


def _config(folder: RunFolder) -> Config:
    """Raises UserError for a config that does not hold: the folder may come from anybody."""
    return load_config(None, base=folder.document()["config"]).config


def picture(folder: RunFolder, percent: int) -> Path:
    return _place(folder) / f"{percent:03d}.png"


def _place(folder: RunFolder) -> Path:
    return folder.samples / "strengths"


def _lives(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def commands(run: Path, number: int) -> list[list[str]]:
    """The words of `whitetuner sample` for each strength; every value is an argument of its own."""
    folder = RunFolder(run)
    prompt = _config(folder).preview.prompts[number]
    more = [f"--prompt={prompt.text}", f"--negative={prompt.negative}", f"--seed={prompt.seed}"]
    more += [f"--size={'x'.join(map(str, prompt.size))}"] if prompt.size else []
    more += [f"--steps={prompt.steps}"] if prompt.steps is not None else []
    more += [f"--cfg={prompt.cfg}"] if prompt.cfg is not None else []
    more += [f"--image={path}" for path in prompt.images]
    return [
        ["sample", *more, f"--strength={percent / 100}", f"--out={picture(folder, percent)}", "--", str(run)]
        for percent in PERCENTS
    ]


def main(run: Path, number: int) -> int:
    held, wish = Held(), wish_of("any", devices())
    while not held.take(wish, run):
        time.sleep(_LOOK_EVERY_S)
    try:
        for words in commands(run, number):
            done = subprocess.run([*PYTHON, "-m", "whitetuner", *words])
            if done.returncode != 0:
                return done.returncode
        return 0
    finally:
        held.release()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
