"""Which runs this user has on this machine: one small file each, written by the training process whoever started it.

A run is running, waiting for a device, or over; that is told from its process and its folder each time, never stored, so a
killed process or a restarted machine leaves nothing that is stuck.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from whitetuner import tongue
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.runs.devices import CPU, Device, Held, Wish, devices, holder, wish_of
from whitetuner.runs.events import RunStarted, last_of
from whitetuner.runs.files import write_atomically
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.state import state_folder

#: Seconds between looks at the devices while waiting.
LOOK_EVERY_S = 0.5
#: Seconds that a started process may take until it has written who it is.
BIRTH_S = 60.0
#: Records kept; the oldest runs leave the list (their folders stay).
KEPT = 1000
#: Environment variable by which the page tells the process where its output goes.
LOG_VARIABLE = "WHITETUNER_LOG"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One start of a run. run, config, cwd, log: absolute paths; devices: names of what it wants or holds; pid and born tell
    a process from a later one of the same number; asked_at: its place in the queue; error: why it did not start; family and
    task: as far as they are known before the run's own files tell them."""

    run: str
    config: str
    cwd: str
    gpus: str = "auto"
    resume: str | None = None
    log: str = ""
    pid: int = 0
    born: float = 0.0
    asked_at: float = field(default_factory=time.time)
    waiting: bool = False
    devices: tuple[str, ...] = ()
    exit: int | None = None
    error: str = ""
    family: str = ""
    task: str = ""

    @property
    def id(self) -> str:
        """Of the run's folder: a resumed run is the same one."""
        return id_of(Path(self.run))

    @property
    def alive(self) -> bool:
        """Is its process there? A zombie is not, and neither is another process with its number."""
        if self.pid == 0:
            return self.exit is None and not self.error and time.time() - self.asked_at < BIRTH_S
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.born) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def write(self) -> None:
        """Raises OSError when the state folder cannot be written."""
        # ASCII: a folder's name need not be UTF-8, and is read back as it is.
        write_atomically(_folder() / f"{self.id}.json", json.dumps(dataclasses.asdict(self)))

    def with_(self, **changes: object) -> Job:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def id_of(run: Path) -> str:
    """A job's id: the same for the same run folder, and safe as a file's name."""
    return hashlib.sha256(str(run).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _folder() -> Path:
    return state_folder() / "runs"


def read(ident: str) -> Job | None:
    """The job of a run's id (see `id_of`)."""
    if not ident.isalnum():
        return None
    try:
        values: dict[str, Any] = json.loads((_folder() / f"{ident}.json").read_text(encoding="utf-8"))
        known = {one.name for one in dataclasses.fields(Job)}
        given: dict[str, Any] = {key: value for key, value in values.items() if key in known}
        return Job(**{**given, "devices": tuple(given.get("devices", ()))})
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # removed this moment, or written by another version


def jobs() -> list[Job]:
    """All, the newest first."""
    found = [job for path in _folder().glob("*.json") if (job := read(path.stem)) is not None]
    return sorted(found, key=lambda job: job.asked_at, reverse=True)


def state_of(job: Job) -> str:
    """waiting, starting, running, finished, stopped, failed, crashed, refused (never began) or removed (its folder is gone)."""
    folder = RunFolder(Path(job.run))
    if job.alive and (job.waiting or folder.running()):
        return "waiting" if job.waiting else "running"
    if (
        job.alive or (folder.control / "pid").exists()
    ):  # on its way in or out, or killed: looked at anew each time
        return _told_by(job)
    return _of_the_past(job, stamp_of(folder))


def stamp_of(folder: RunFolder) -> tuple[int, ...]:
    """Changes when a run's events or its run.json do."""
    found: list[int] = []
    for path in (folder.events, folder.run_file):
        try:
            status = path.stat()
            found += [status.st_mtime_ns, status.st_size]
        except OSError:
            found += [0, -1]
    return tuple(found)


@lru_cache(maxsize=4096)
def _of_the_past(job: Job, stamp: tuple[int, ...]) -> str:
    """A page asks every second, and the log of a long run is 60 MB."""
    return _told_by(job)


def _told_by(job: Job) -> str:
    """The state as the run's folder tells it."""
    folder = RunFolder(Path(job.run))
    began = last_of(folder.events, (RunStarted,)) if folder.is_run() else None
    # This start left no word in the run's folder (yet). The time alone does not tell: clocks are set back.
    silent = not isinstance(began, RunStarted) or (began.pid != job.pid and began.time < job.asked_at)
    if silent and job.alive and not job.error:
        return "starting"
    if silent and not (job.error or job.waiting) and not Path(job.run).exists():
        return "removed"
    if silent and (job.error or job.waiting or job.exit is not None or not folder.is_run()):
        return "refused"
    return folder.status()


def queue() -> list[Job]:
    """The waiting ones, the next first."""
    return sorted((job for job in jobs() if job.waiting and job.alive), key=lambda job: job.asked_at)


def forget(job: Job) -> None:
    """Takes a run that is over off the list; its folder stays."""
    (_folder() / f"{job.id}.json").unlink(missing_ok=True)


def cancel(job: Job) -> bool:
    """Ends a process that still waits for a device; False when it does not wait (any more)."""
    if not (job.waiting and job.alive and job.pid):
        return False
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(job.pid)
        process.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(5)
    forget(job)
    return True


@contextmanager
def claimed(
    run: Path, config: Path, *, gpus: str, resume: str | None, wait: bool, say: Say = tongue.say
) -> Iterator[list[Device]]:
    """The devices of a training, held while inside, and its line in the list of runs.

    gpus: see `wish_of`; wait: until they are free, first come, first served. Without it a GPU that is taken is refused with a
    UserError, while a CPU is shared. With "any" this process sees no other GPUs than those it got. Other ranks of a run than
    the first hold nothing: the first does for all.
    """
    if os.environ.get("RANK", "0") != "0":
        yield []
        return
    run, held = run.resolve(), Held()
    job = _born(run, config, gpus, resume)
    there = devices()
    wish = wish_of(gpus, there)
    job = job.with_(devices=tuple(one.name for one in wish.devices), waiting=True)
    try:
        _record(job, say)
        if not RunFolder(run).running():  # else it will be refused at once, with the reason
            _take(job, wish, held, wait, say)
        job = job.with_(waiting=False, devices=tuple(one.name for one in held.devices))
        _record(job, say)
        if gpus.startswith("any") and CPU not in held.devices:
            # Before PyTorch looks at them: whichever they are, the run then finds them as its first ones.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(one.name for one in held.devices)
        yield held.devices
    except UserError as error:
        _record(job.with_(error=str(error), waiting=False), say)
        raise
    except KeyboardInterrupt:
        if job.waiting:
            forget(job)
        raise
    finally:
        held.release()


def _born(run: Path, config: Path, gpus: str, resume: str | None) -> Job:
    before = read(id_of(run))
    if before is not None and before.alive and before.waiting and before.pid not in (0, os.getpid()):
        raise UserError(
            "this run waits for a device already (process {pid})",
            where=str(run),
            mend="wait for it, or take it out of the queue: whitetuner stop {run}",
            pid=before.pid,
            run=run,
        )
    announced = (
        before is not None and before.pid == 0 and before.alive
    )  # by `start`: its place in the queue counts
    return Job(
        run=str(run),
        config=str(config.resolve()),
        cwd=str(Path.cwd()),
        asked_at=before.asked_at if announced and before is not None else time.time(),
        gpus=gpus,
        resume=resume,
        log=os.environ.get(LOG_VARIABLE, ""),
        family=before.family if before is not None else "",
        task=before.task if before is not None else "",
        pid=os.getpid(),
        born=psutil.Process().create_time(),
    )


def _take(job: Job, wish: Wish, held: Held, wait: bool, say: Say) -> None:
    told = False
    while True:
        ahead = [one for one in queue() if one.asked_at < job.asked_at and wish.overlaps(one.devices)]
        try:
            if (not ahead or not wait) and held.take(wish, Path(job.run)):
                return
        except OSError as error:
            say(f"warning: device locks cannot be written ({error.strerror}): {state_folder()}")
            return
        if not wait:
            if all(one is CPU for one in wish.devices):
                return
            taken = _taken(wish)
            raise UserError(
                "{devices}: another training is on it (process {pid}: {run})",
                where="--gpus",
                mend="wait for it: add --wait; or take another one, e.g. --gpus any; `whitetuner jobs` lists who is on which",
                code=EXIT_ENVIRONMENT,
                devices=", ".join(f"GPU {one.index} ({one.title})" for one in taken or wish.devices),
                pid=", ".join(str(holder(one).get("pid", "?")) for one in taken) or "?",
                run=", ".join(str(holder(one).get("run", "?")) for one in taken) or "?",
            )
        if not told:
            told = True
            names = ", ".join("CPU" if one is CPU else f"GPU {one.index}" for one in wish.devices)
            say(f"waiting for {names} ({len(ahead)} ahead in the queue)")
        time.sleep(LOOK_EVERY_S)


def _taken(wish: Wish) -> list[Device]:
    """Of the devices wished for, those that a living process holds."""
    return [
        one for one in wish.devices if (pid := holder(one).get("pid")) and psutil.pid_exists(int(str(pid)))
    ]


def _record(job: Job, say: Say) -> None:
    """The list is a convenience: that it cannot be written fails no run, and is said."""
    try:
        job.write()
        _prune()
    except OSError as error:
        say(f"warning: the list of runs cannot be written ({error.strerror}): {state_folder()}")


def _prune() -> None:
    paths: Sequence[Path] = list(_folder().glob("*.json"))
    if len(paths) > KEPT:
        by_age = sorted(paths, key=lambda path: path.stat().st_mtime)
        for path in by_age[: len(paths) - KEPT]:
            path.unlink(missing_ok=True)
