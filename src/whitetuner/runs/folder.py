"""A run's folder: where everything of a run is, who owns it, and what others may ask of it.

Layout in docs/run-folder.md. The owner holds a lock of the operating system, which a killed process loses by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from whitetuner.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from whitetuner.runs.events import Event, EventLog, read
from whitetuner.runs.files import write_atomically

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


class RunFolder:
    """Paths of a run and its small files. Reading needs no lock; `open` takes it for the training process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file, self.run_file = path / "config.toml", path / "run.json"
        self.events, self.report = path / "events.jsonl", path / "report.html"
        self.control, self.logs, self.samples = path / "control", path / "logs", path / "samples"
        self.checkpoints, self.final, self.tensorboard = path / "checkpoints", path / "final", path / "tensorboard"
        self._log = EventLog(self.events)

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, resume: bool) -> Iterator[RunFolder]:
        """The folder, made if need be, owned while inside.

        Raises UserError when another process owns it, when it cannot be written, or when a run is in it and resume is False.
        """
        folder = cls(path)
        try:
            folder.control.mkdir(parents=True, exist_ok=True)
            probe = folder.control / f".probe-{os.getpid()}"
            probe.write_text("", encoding="utf-8")
            probe.unlink()
        except OSError as error:
            raise UserError(
                "the output folder cannot be written ({reason})",
                where=str(path),
                mend="set run.output_dir to a folder you may write to",
                code=EXIT_ENVIRONMENT,
                reason=error.strerror or error,
            ) from error
        lock = FileLock(folder.control / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                "another process ({pid}) is training into this folder",
                where=str(path),
                mend="wait for it, stop it with `whitetuner stop {path}`, or give this run another run.name",
                pid=folder.owner() or "?",
                path=path,
            ) from error
        try:
            if folder.is_run() and not resume:
                finished = folder._ended() == "finished"
                raise UserError(
                    "a finished run is in this folder" if finished else "a run that is not finished is in this folder",
                    where=str(path),
                    mend="to go on:  add --resume latest{more}\n     to begin another:  add --set run.name=\"another name\"",
                    more=" --set run.steps=MORE" if finished else "",
                )
            write_atomically(folder.control / "pid", str(os.getpid()))
            for word in ("stop", "save", "preview"):
                (folder.control / word).unlink(missing_ok=True)
            yield folder
        finally:
            (folder.control / "pid").unlink(missing_ok=True)
            lock.release()

    # -- the owner's side ------------------------------------------------------------------------------------------

    def begin(self, config_text: str, document: dict[str, Any], **extra: Any) -> dict[str, Any]:
        """Writes config.toml and run.json (or finds the run's earlier one); returns run.json's document.

        document: the config as JSON values; extra: more for run.json (origins, resolved, ...)
        """
        self._log.mend()
        if self.is_run():
            found = self.document()
            found.setdefault("history", []).append({"config": found["config"], "versions": found["versions"]})
            found.update({"config": document, "versions": versions(), **extra})
        else:
            found = {"format": 1, "run_id": uuid.uuid4().hex, "config": document, "versions": versions(), **extra}
            found["hardware"] = {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()}
        write_atomically(self.config_file, config_text)
        write_atomically(self.run_file, json.dumps(found, indent=1, ensure_ascii=False))
        return found

    def update(self, **values: Any) -> None:
        """Changes top-level values of run.json."""
        write_atomically(self.run_file, json.dumps({**self.document(), **values}, indent=1, ensure_ascii=False))

    def append(self, event: Event) -> None:
        try:
            self._log.append(event)
        except OSError as error:
            raise UserError(
                "what happens cannot be written down any more ({reason})",
                where=str(self.events),
                mend="free some space, then go on with --resume latest",
                code=EXIT_FAILED,
                reason=error.strerror or error,
            ) from error

    def cut_events_after(self, step: int) -> None:
        self._log.cut_after(step)

    def asked(self, word: str) -> bool:
        """Was this asked for (stop, save, preview)?"""
        return (self.control / word).exists()

    def take(self, word: str) -> bool:
        """As `asked`, and the wish is fulfilled now."""
        if not self.asked(word):
            return False
        (self.control / word).unlink(missing_ok=True)
        return True

    # -- everybody's side ------------------------------------------------------------------------------------------

    def is_run(self) -> bool:
        return self.run_file.is_file()

    def require(self) -> None:
        """Raises UserError when there is no run here."""
        if not self.is_run():
            raise UserError(
                "this is no run's folder: run.json is missing", where=str(self.path), mend="give the folder OUTPUT/NAME of a run"
            )

    def document(self) -> dict[str, Any]:
        """run.json. Raises UserError when it is damaged."""
        try:
            return json.loads(self.run_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                "run.json is damaged ({reason})",
                where=str(self.path),
                mend="start a new run; method.init_from takes the adapter of a checkpoint along",
                reason=error,
            ) from error

    def request(self, word: str) -> None:
        """Asks the owner for something: stop, save, preview."""
        self.control.mkdir(exist_ok=True)
        write_atomically(self.control / word, "")

    def owner(self) -> int | None:
        try:
            return int((self.control / "pid").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def running(self) -> bool:
        """True while a process owns the folder."""
        if not self.control.is_dir():
            return False
        lock = FileLock(self.control / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def status(self) -> str:
        """running, finished, stopped, failed or crashed."""
        return "running" if self.running() else (self._ended() or "crashed")

    def end_process(self) -> None:
        """Ends the owner at once, without saving."""
        pid = self.owner()
        if pid is not None and self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)

    def final_adapter(self, kind: str) -> Path:
        """The finished run's adapter file. Raises UserError when it is not there."""
        path = self.final / kind / f"{kind}.safetensors"
        if not path.is_file():
            raise UserError(
                "this run has no final file yet",
                where=str(self.path),
                mend="let it end (--resume latest), or give --adapter a checkpoint's file",
            )
        return path

    def _ended(self) -> str | None:
        found, _ = read(self.events)
        for event in reversed(found):
            if event.kind == "ended":
                return event.status  # type: ignore[attr-defined]
            if event.kind == "failed":
                return "failed"
            if event.kind == "run_started":
                return None
        return None


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
