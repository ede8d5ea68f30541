"""One run in words and numbers for the page, and what can be asked of it. Nothing here is kept: a restart shows the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from whitetuner.errors import UserError
from whitetuner.gui import strengths
from whitetuner.gui.pickers import Roots
from whitetuner.gui.run_reader import LINES, Reader, log_lines, short
from whitetuner.runs import events, jobs
from whitetuner.runs.devices import Device, devices
from whitetuner.runs.files import inside
from whitetuner.runs.folder import RunFolder
from whitetuner.runs.jobs import Job
from whitetuner.runs.listing import row_of, rows

#: Seconds for which an answer serves every open page.
_FRESH_S = 0.7
_DEVICES_FRESH_S = 3.0
#: Readers kept: of the runs that were looked at last.
_READERS = 8


class Runs:
    """The runs of this machine as one server sees them; safe to ask from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict[str, Reader] = {}
        self._answers: dict[str, tuple[float, Any]] = {}

    def listed(self) -> list[dict[str, Any]]:
        """Every run, the newest first, as `whitetuner jobs` tells it."""
        return self._fresh("rows", _FRESH_S, rows)

    def machine(self) -> dict[str, Any]:
        """The GPUs and the host's memory, for the strip on top."""
        memory = psutil.virtual_memory()
        found: list[Device] = self._fresh("devices", _DEVICES_FRESH_S, devices)
        return {
            "devices": [
                {
                    "index": one.index,
                    "title": one.title,
                    "total_mb": one.total_mb,
                    "used_mb": one.used_mb,
                    "busy": one.busy_percent,
                    "celsius": one.celsius,
                    "watts": one.watts,
                }
                for one in found
            ],
            "ram_gb": round(memory.total / 2**30, 1),
            "ram_used_gb": round((memory.total - memory.available) / 2**30, 1),
        }

    def reader(self, job: Job) -> Reader:
        with self._lock:
            found = self._readers.pop(job.id, None) or Reader(RunFolder(Path(job.run)))
            self._readers[job.id] = found
            for old in list(self._readers)[:-_READERS]:
                del self._readers[old]
        found.look()
        return found

    def origin(self, job: Job, roots: Roots) -> tuple[Reader, int] | None:
        """(the run that this one began from, at which step of it); None for others."""
        found = RunFolder(Path(job.run)).origin()
        if found is None or not roots.allows(found[0].path):
            return None
        return self.reader(replace(job, run=str(found[0].path))), found[1]

    def shown(self, job: Job) -> dict[str, Any]:
        """Everything of a run but its curve and its log."""
        state = self._fresh(f"state {job.id}", _FRESH_S, lambda: jobs.state_of(job))
        reader = self.reader(job)
        place = (
            next((n for n, one in enumerate(jobs.queue(), 1) if one.id == job.id), None)
            if job.waiting
            else None
        )
        row = row_of(job, place)
        steps = row["steps"] or (reader.started.steps if reader.started else None)
        began = state != "refused"
        progress = reader.progress
        found = {
            **row,
            "state": state,
            "steps": steps,
            "reason": reason_of(job, state, reader),
            "log": job.log,
            "phase": reader.phase.name if reader.phase and began else "",
            "done": progress.done if progress else None,
            "total": progress.total if progress else None,
            "numbers": reader.numbers(steps) if began else {},
            "ranks": ranks_of(reader.folder) if began else [],
            "previews": previews_of(reader),
            "saved": sorted(reader.saved),
            "validation": [[s, short(one.loss)] for s, one in sorted(reader.validations.items())],
            "best": reader.best(),
            "messages": [[one.level, one.text] for one in list(reader.messages)[-20:]],
            "finals": finals(reader.folder),
            "strengths": strengths.found(reader.folder),
            "version": reader.version,
            "can": actions(state, reader),
        }
        return found

    def log(self, job: Job) -> list[str]:
        """The process's own output where it was kept, else what happened, a line each."""
        return own_log(job) or list(self.reader(job).lines)

    def _fresh(self, name: str, seconds: float, make: Callable[[], Any]) -> Any:
        """One answer for all that ask within a moment: ten open pages must not look ten times (and not meet in a lock file)."""
        with self._lock:
            found = self._answers.get(name)
            if found is None or time.monotonic() - found[0] > seconds:
                found = (time.monotonic(), make())
                self._answers[name] = found
            return found[1]

    def changed(self) -> None:
        """Something was asked for: the next answers are looked up anew."""
        with self._lock:
            self._answers.clear()


def job_of(ident: str, roots: Roots) -> Job:
    """Raises UserError when there is no such run (any more), or none that this page may look at."""
    job = jobs.read(ident)
    if job is None or not roots.allows(Path(job.run)):
        raise UserError("this run is not in the list", mend="choose one in the list of runs")
    return job


def actions(state: str, reader: Reader) -> list[str]:
    """What can be asked of a run in this state: stop, now, save, preview, cancel, resume, more, forget."""
    if state == "running":
        training = reader.phase is not None and reader.phase.name == "train"
        return ["stop", "now", *(["save", "preview", "more"] if training else [])]
    if state == "waiting":
        return ["cancel"]
    if state == "starting":
        return ["now"]
    if state == "finished":
        return ["more", "forget"]
    return (
        ["resume", "forget", *(["more"] if state == "stopped" else [])] if state != "removed" else ["forget"]
    )


def reason_of(job: Job, state: str, reader: Reader) -> dict[str, Any]:
    """Why a run is not going on: {kind, text}; kind is a word of the page, text what the run itself said."""
    if state == "failed" and isinstance(reader.end, events.Failed):
        return {"kind": "failed", "text": reader.end.reason}
    if state == "refused" and job.error:
        return {"kind": "refused", "text": job.error}
    if state not in ("crashed", "refused"):
        return {}
    told = "\n".join(own_log(job, most=6))
    if job.exit is not None and job.exit != 0:
        kind = "killed" if job.exit in (-9, 137) else "exit"
        return {"kind": kind, "text": told, "code": job.exit}
    if psutil.boot_time() > job.asked_at:
        return {"kind": "reboot", "text": told}
    return {"kind": "gone", "text": told}


def previews_of(reader: Reader) -> list[dict[str, Any]]:
    """Of each step that has some: its prompts, how many pictures, and which of them are clips."""
    return [
        {
            "step": one.step,
            "prompts": one.prompts,
            "count": len(one.files),
            "films": [film_beside(reader.folder.path, file) is not None for file in one.files],
        }
        for one in sorted(reader.previews.values(), key=lambda one: one.step)
    ]


def ranks_of(folder: RunFolder) -> list[dict[str, Any]]:
    """Where each rank trains and how many of its blocks wait on the host, as the run wrote it down."""
    try:
        found = folder.document().get("ranks", [])
    except (UserError, OSError):
        return []  # not there yet, or not a run's
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def own_log(job: Job, most: int = LINES) -> list[str]:
    """The last lines of the process's own output; none of a log that is no file of the run's folder."""
    log = inside(Path(job.run), job.log) if job.log else None
    return log_lines(log, most) if log is not None else []


def film_beside(run: Path, place: str) -> str | None:
    """The clip of which a preview's picture is the contact sheet; None where it is a picture."""
    film = Path(place).with_suffix(".mp4").as_posix()
    return None if inside(run, film) is None else film


def finals(folder: RunFolder) -> list[dict[str, Any]]:
    """The files to take: name, bytes, place inside the run, and who knows their names. Links out of it are none of them."""
    paths = sorted(folder.final.rglob("*.safetensors")) if folder.final.is_dir() else []
    paths += sorted(folder.final.glob("*_comfyui.json")) if folder.final.is_dir() else []
    names = folder.document().get("names", {}) if paths and folder.is_run() else {}
    return [
        {"name": path.name, "place": place, "bytes": real.stat().st_size, "names": names.get(place)}
        for path, place in ((path, path.relative_to(folder.path).as_posix()) for path in paths)
        if (real := inside(folder.path, path)) is not None
    ]


def ask(job: Job, wish: str) -> None:
    """Fulfils one of `actions` but resume and more. Raises UserError when it cannot be (any more)."""
    folder = RunFolder(Path(job.run))
    if wish == "cancel":
        if not jobs.cancel(job):
            raise UserError("it does not wait any more", mend="stop it instead")
    elif wish == "forget":
        if jobs.state_of(job) in ("running", "starting", "waiting"):
            raise UserError("the run is still going on", mend="stop it first")
        jobs.forget(job)
    elif wish == "now":
        _end(job, folder)
    else:
        folder.request(wish)


def _end(job: Job, folder: RunFolder) -> None:
    """Ends the process and what it started, after making sure that it still is that process."""
    if folder.running():
        folder.end_process()
        return
    if job.alive and job.pid:
        process = psutil.Process(job.pid)
        for one in [*process.children(recursive=True), process]:
            one.kill()
        return
    raise UserError("nothing is running here", where=job.run, mend="resume it, or start another run")
