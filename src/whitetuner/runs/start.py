"""Starts a training as a process of its own that outlives whoever started it: no window, no pipe, no shell."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from whitetuner import tongue
from whitetuner.paths import PYTHON
from whitetuner.runs import jobs
from whitetuner.runs.jobs import Job

#: Windows: no console of its own (clicking into one would freeze the training), no part of ours, outside of our job object.
NEW_GROUP, NO_WINDOW, BREAKAWAY = 0x200, 0x8000000, 0x1000000


def start(
    config: Path,
    run: Path,
    *,
    cwd: Path,
    gpus: str = "any",
    resume: str | None = None,
    overrides: Sequence[str] = (),
    family: str = "",
    task: str = "",
) -> Job:
    """`whitetuner train` over a config file, in the queue for its devices. The output goes to the run's logs/.

    Every value is an argument of its own (`--set=KEY=VALUE`), so nothing of it can be read as an option or reach a shell.
    """
    run = run.resolve()
    log = run / "logs" / f"{time.strftime('%Y%m%d_%H%M%S')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ["train", f"--gpus={gpus}", "--wait"]
    words += [f"--resume={resume}"] if resume is not None else []
    words += [f"--set={one}" for one in overrides]
    job = Job(
        run=str(run),
        config=str(config.resolve()),
        cwd=str(cwd),
        gpus=gpus,
        resume=resume,
        log=str(log),
        waiting=True,
        family=family,
        task=task,
    )
    job.write()
    with log.open("ab") as file:
        process = detached([*PYTHON, "-m", "whitetuner", *words, "--", str(config.resolve())], cwd, file, log)
    threading.Thread(target=_await_end, args=(process, job.id), daemon=True).start()
    return job


def detached(command: Sequence[str], cwd: Path, output: object, log: Path) -> subprocess.Popen[bytes]:
    """The process, in a session of its own. output: an open file for both of its streams."""
    environment = {
        **os.environ,
        "PYTHONUTF8": "1",
        "PYTHONUNBUFFERED": "1",
        tongue.VARIABLE: "en",  # a log may be looked at in either language
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        jobs.LOG_VARIABLE: str(log),
    }
    common = {
        "cwd": cwd,
        "env": environment,
        "stdin": subprocess.DEVNULL,
        "stdout": output,
        "stderr": subprocess.STDOUT,
    }
    if os.name != "nt":
        return subprocess.Popen(list(command), start_new_session=True, **common)  # type: ignore[call-overload]
    flags = NEW_GROUP | NO_WINDOW
    try:
        return subprocess.Popen(list(command), creationflags=flags | BREAKAWAY, **common)  # type: ignore[call-overload]
    except PermissionError:  # a job object that lets nothing go: it then ends with whoever owns that
        return subprocess.Popen(list(command), creationflags=flags, **common)  # type: ignore[call-overload]


def _await_end(process: subprocess.Popen[bytes], ident: str) -> None:
    """Writes down how it ended, which only its parent learns; a parent that is gone by then loses that alone."""
    code = process.wait()
    job = jobs.read(ident)
    if job is not None and job.pid in (0, process.pid):
        job.with_(exit=code).write()
