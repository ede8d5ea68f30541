"""wandb and SwanLab as readers of a run's events, each in a process of its own: `python -m whitetuner.runs.follow`.

So a library that fails, asks something or waits for a network can neither stop nor slow the run; what it says goes into the run's
logs/. Each visit to a run makes one record there with the whole curve, read from events.jsonl from its beginning.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.runs import events
from whitetuner.runs.scalars import scalars

#: Library -> environment variable of its key, which it needs for sending at once.
LIBRARIES = {"wandb": "WANDB_API_KEY", "swanlab": "SWANLAB_API_KEY"}
#: Names the Python that has them, where it is another. Not in the config: one from a stranger must not say what is started here.
PYTHON = "WHITETUNER_LOG_PYTHON"
#: Seconds between looks at the events; that a run waits at its end for what is left to be handed on.
LOOK_S, END_S = 1.0, 60.0

Sink = tuple[Callable[[int, dict[str, float]], object], Callable[[], object]]


def refuse_missing(wanted: Mapping[str, str]) -> None:
    """Raises UserError for a library that is not installed, or has no key to send with. wanted: name -> a mode."""
    python = os.environ.get(PYTHON)
    for name, mode in wanted.items():
        if mode != "off" and not _has(python, name):
            raise UserError(
                "log.{name} needs the package {name}, which {python} does not have",
                where=PYTHON if python else f"log.{name}",
                mend="python -m venv FOLDER, then `pip install {name}` with that folder's pip, and set {place} to its "
                "python: such packages ask for other versions than White Tuner does; or log.{name} = 'off'",
                code=EXIT_ENVIRONMENT,
                name=name,
                place=PYTHON,
                python=python or sys.executable,
            )
        if mode == "online" and not os.environ.get(LIBRARIES[name]):
            raise UserError(
                "{name} sends only with a key, and {variable} is not set",
                where=f"log.{name}",
                mend="set {variable} to your key, or log.{name} = 'offline' and `{name} sync` later",
                code=EXIT_ENVIRONMENT,
                name=name,
                variable=LIBRARIES[name],
            )


def _has(python: str | None, name: str) -> bool:
    if python is None:
        return find_spec(name) is not None
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    try:
        return subprocess.run([python, "-c", look], timeout=END_S, stdin=subprocess.DEVNULL).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def followers(
    wanted: Mapping[str, str], project: str, folder: Path, warn: Callable[[str], None]
) -> list[Follower]:
    """One for each library that is not off; see refuse_missing and Follower."""
    return [Follower(name, mode, project, folder, warn) for name, mode in wanted.items() if mode != "off"]


class Follower:
    """The process of one library, beside a run. Called with each event, to see whether it still lives.

    warn: told once when it does not
    """

    def __init__(
        self,
        name: str,
        mode: str,
        project: str,
        folder: Path,
        warn: Callable[[str], None],
    ) -> None:
        self.name, self.warn, self.told = name, warn, False
        self.log = folder / "logs" / f"{name}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words = [
            os.environ.get(PYTHON) or sys.executable,
            "-m",
            "whitetuner.runs.follow",
            name,
            mode,
            project,
            str(folder),
        ]
        # Another Python finds this package, too: what the process reads of it needs nothing but the standard library.
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(one for one in paths if one)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def __call__(self, event: events.Event) -> None:
        if self.process.poll() not in (None, 0):
            self._tell("failed")
        if isinstance(event, (events.Ended, events.Failed)):
            self.close()

    def close(self) -> None:
        """Lets it hand on what is left; after END_S it is ended."""
        assert self.process.stdin is not None
        if self.process.stdin.closed:
            return
        self.process.stdin.close()
        try:
            if self.process.wait(END_S):
                self._tell("failed")
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self._tell(f"was not done {END_S:g} s after the run and was ended")

    def _tell(self, what: str) -> None:
        if not self.told:
            self.told = True
            self.warn(
                f"{self.name} {what}: its last words are in logs/{self.log.name}; the run and its files do without"
            )


def follow(name: str, mode: str, project: str, folder: Path, over: threading.Event) -> None:
    """Hands on every point of the run until it is over, and those that came before."""
    config = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
    log, finish = _SINKS[name](mode, project, folder, config)
    offset, last = 0, False
    while not last:
        last = over.wait(LOOK_S)
        found, offset = events.read(folder / "events.jsonl", offset)
        for event in found:
            point = scalars(event)
            if point is not None:
                log(*point)
    finish()


def _wandb(mode: str, project: str, folder: Path, config: dict[str, Any]) -> Sink:
    wandb: Any = importlib.import_module("wandb")
    # Nothing of the machine or the program is collected beside what is handed over.
    settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_stats=True)
    how = {
        "project": project or None,
        "name": folder.name,
        "dir": str(folder),
        "mode": mode,
        "config": config,
    }
    run = wandb.init(**how, settings=settings)
    return lambda step, values: run.log(values, step=step), run.finish


def _swanlab(mode: str, project: str, folder: Path, config: dict[str, Any]) -> Sink:
    swanlab: Any = importlib.import_module("swanlab")
    place = folder / "swanlab"
    place.mkdir(exist_ok=True)
    run = swanlab.init(
        project=project or None, name=folder.name, log_dir=str(place), mode=mode, config=config
    )
    return lambda step, values: run.log(values, step=step), swanlab.finish


_SINKS: dict[str, Callable[[str, str, Path, dict[str, Any]], Sink]] = {"wandb": _wandb, "swanlab": _swanlab}


def _main(name: str, mode: str, project: str, folder: str) -> None:
    over = threading.Event()

    def watch() -> None:
        sys.stdin.buffer.read()  # ends with the run's process, however that ends
        over.set()

    threading.Thread(target=watch, daemon=True).start()
    follow(name, mode, project, Path(folder), over)


if __name__ == "__main__":
    _main(*sys.argv[1:])
