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
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from whitetuner.errors import EXIT_ENVIRONMENT, EXIT_FAILED, FULL, UserError
from whitetuner.runs.events import Ended, Event, EventLog, Failed, RunStarted, StepDone, last_of
from whitetuner.runs.files import write_atomically

#: What can be asked of a run, each a file in control/.
WISHES = ("stop", "save", "preview")
#: Of run.json, what a resume may change: the earlier ones stay in its history.
KEPT = ("config", "versions", "hardware", "resolved")
#: A look at who owns the folder (`running`) holds the lock for a moment; a start waits that out.
LOCK_WAIT_S = 1.0
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


class RunFolder:
    """Paths of a run and its small files. Reading needs no lock; `open` takes it for the training process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file, self.run_file = path / "config.toml", path / "run.json"
        self.events, self.report = path / "events.jsonl", path / "report.html"
        self.control, self.logs, self.samples = path / "control", path / "logs", path / "samples"
        self.checkpoints, self.final, self.tensorboard = (
            path / "checkpoints",
            path / "final",
            path / "tensorboard",
        )
        self._log = EventLog(self.events)

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, resume: bool, config: Path | None = None) -> Iterator[RunFolder]:
        """The folder, made if need be, owned while inside. config: the user's file, for the commands in messages.

        Raises UserError when another process owns it, when it cannot be written, or when a run is in it and resume is False
        (a run that ended before its first step is no loss: it begins anew).
        """
        folder = cls(path)
        folder._make()
        lock = FileLock(folder.control / "lock")
        try:
            lock.acquire(timeout=LOCK_WAIT_S)
        except Timeout as error:
            raise UserError(
                "another process ({pid}) is training into this folder",
                where=str(path),
                mend="wait for it, or stop it:       whitetuner stop {path}\n"
                "     or train beside it:            whitetuner train {config} --set run.name={other}",
                pid=folder.owner() or "?",
                path=_quoted(path),
                config=_quoted(config or folder.config_file),
                other=_quoted(_free_name(path)),
            ) from error
        except OSError as error:
            raise folder._unwritable(error) from error
        try:
            if folder.is_run() and not resume:
                folder._refuse_or_clear(config or folder.config_file)
            for left in (*path.glob(".*.writing"), *folder.control.glob(".*.writing")):
                left.unlink(missing_ok=True)  # of a process that was killed in the middle of it
            try:
                write_atomically(folder.control / "pid", str(os.getpid()))
            except OSError as error:
                raise folder._unwritable(error) from error
            for word in WISHES:
                (folder.control / word).unlink(missing_ok=True)
            yield folder
        finally:
            (folder.control / "pid").unlink(missing_ok=True)
            lock.release()

    def _make(self) -> None:
        try:
            self.control.mkdir(parents=True, exist_ok=True)
            probe = self.control / f".probe-{os.getpid()}"
            probe.write_text("", encoding="utf-8")
            probe.unlink()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            "the output folder cannot be written ({reason})",
            where=str(self.path),
            mend="make room there, or set run.output_dir to a folder on another disk"
            if error.errno in FULL
            else "set run.output_dir to a folder you may write to",
            code=EXIT_ENVIRONMENT,
            reason=error.strerror or error,
        )

    def _refuse_or_clear(self, config: Path) -> None:
        ended = self._ended()
        if ended in ("failed", "stopped") and not self._learned():
            self.run_file.unlink()
            self.events.unlink(missing_ok=True)
            return
        raise UserError(
            "a finished run is in this folder"
            if ended == "finished"
            else "a run that is not finished is in this folder",
            where=str(self.path),
            mend="to go on:           whitetuner train {config} --resume latest{more}\n"
            "     to begin another:   whitetuner train {config} --set run.name={other}",
            config=_quoted(config),
            more=" --set run.steps=MORE" if ended == "finished" else "",
            other=_quoted(_free_name(self.path)),
        )

    # -- the owner's side ------------------------------------------------------------------------------------------

    def begin(self, config_text: str, document: dict[str, Any], **extra: Any) -> dict[str, Any]:
        """Writes config.toml and run.json (or finds the run's earlier one); returns run.json's document.

        document: the config as JSON values; extra: more for run.json (origins, resolved, ...)
        """
        self._log.mend()
        if self.is_run():
            found = self.document()
            found.setdefault("history", []).append({key: found.get(key) for key in KEPT})
            found.update({"config": document, "versions": versions(), "hardware": hardware(), **extra})
        else:
            found = {"format": 1, "run_id": uuid.uuid4().hex, "began": time.time(), "config": document}
            found.update({"versions": versions(), "hardware": hardware(), **extra})
        write_atomically(self.config_file, config_text)
        write_atomically(self.run_file, json.dumps(found, indent=1, ensure_ascii=False))
        return found

    def update(self, **values: Any) -> None:
        """Changes top-level values of run.json."""
        write_atomically(
            self.run_file, json.dumps({**self.document(), **values}, indent=1, ensure_ascii=False)
        )

    def append(self, event: Event) -> None:
        with self._writing_down():
            self._log.append(event)

    def sync_events(self) -> None:
        """What happened so far, onto the disk: a checkpoint must not outlive the steps that led to it in a power cut."""
        with self._writing_down():
            self._log.sync()

    @contextmanager
    def _writing_down(self) -> Iterator[None]:
        try:
            yield
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
                "this is no run's folder: run.json is missing",
                where=str(self.path),
                mend="give the folder OUTPUT/NAME of a run",
            )

    def document(self) -> dict[str, Any]:
        """run.json. Raises UserError when it is damaged."""
        try:
            document = json.loads(self.run_file.read_text(encoding="utf-8"))
            if not _is_of_a_run(document):
                raise ValueError("it is not what a run writes")
            return document
        except (ValueError, RecursionError) as error:
            raise UserError(
                "run.json is damaged ({reason})",
                where=str(self.path),
                mend="start a new run; method.init_from takes the adapter of a checkpoint along",
                reason=error,
            ) from error

    def request(self, word: str) -> None:
        """Asks the owner for something: stop, save, preview. Raises UserError when nobody is there to hear it."""
        assert word in WISHES, word
        if not self.running():
            raise UserError(
                "nothing is running here (this run: {status})",
                where=str(self.path),
                mend="`whitetuner jobs` lists what is; to go on: whitetuner train {config} --resume latest",
                status=self.status(),
                config=_quoted(self.config_file),
            )
        try:
            write_atomically(self.control / word, "")
        except OSError as error:
            raise UserError(
                "the wish cannot be left in the run's folder ({reason})",
                where=str(self.control),
                mend="ask as the user who started the run",
                code=EXIT_ENVIRONMENT,
                reason=error.strerror or error,
            ) from error

    def owner(self) -> int | None:
        try:
            return int((self.control / "pid").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def running(self) -> bool:
        """True while a process owns the folder. Where this one may not write (somebody else's run), False: nobody can tell."""
        if not self.control.is_dir():
            return False
        lock = FileLock(self.control / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except OSError:
            return False
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

    def origin(self) -> tuple[RunFolder, int] | None:
        """(the run that this one began at a checkpoint of, its step); None for others, and where that run is gone."""
        try:
            told = self.document()["forked_from"]
            other, step = RunFolder((self.path / told["run"]).resolve()), int(told["step"])
            return (other, step) if other.document()["run_id"] == told["run_id"] else None
        except (UserError, OSError, TypeError, KeyError, ValueError):
            return None

    def final_adapter(self, kind: str, file: str | None = None) -> Path:
        """The finished run's adapter file; file: its name, where several parts learned. Raises UserError when it is not there."""
        path = self.final / kind / (file or f"{kind}.safetensors")
        if not path.is_file():
            raise UserError(
                "this run has no final file yet",
                where=str(self.path),
                mend="let it end (--resume latest), or give --adapter a checkpoint's file",
            )
        return path

    def final_model(self, part: str) -> Path:
        """The finished run's denoiser in diffusers layout, of full training. Raises UserError when it is not there."""
        path = self.final / part
        if not (path / "config.json").is_file():
            raise UserError(
                "this run has no final file yet",
                where=str(self.path),
                mend="let it end (--resume latest), or give --adapter a checkpoint's file",
            )
        return path

    def _ended(self) -> str | None:
        """How the last visit to this run ended; None when it did not (or still goes on)."""
        last = last_of(self.events, (RunStarted, Failed, Ended))
        if isinstance(last, Ended):
            return last.status
        return "failed" if isinstance(last, Failed) else None

    def _learned(self) -> bool:
        """Is there anything to lose?"""
        return any(self.checkpoints.glob("checkpoint-*")) or last_of(self.events, (StepDone,)) is not None


class Guest(RunFolder):
    """The run's folder for a process that only learns with its owner: it writes nothing and hears no wishes."""

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, resume: bool, config: Path | None = None) -> Iterator[RunFolder]:
        yield cls(path)

    def begin(self, config_text: str, document: dict[str, Any], **extra: Any) -> dict[str, Any]:
        return {"run_id": ""}

    def update(self, **values: Any) -> None:
        return

    def append(self, event: Event) -> None:
        return

    def cut_events_after(self, step: int) -> None:
        return

    def asked(self, word: str) -> bool:
        return False


def _is_of_a_run(document: Any) -> bool:
    """Whatever looks at a run reads these; its folder may come from anybody."""
    if not isinstance(document, dict) or not isinstance(document.get("run_id"), str):
        return False
    config, began = document.get("config"), document.get("began", 0.0)
    if not isinstance(config, dict) or not all(isinstance(one, dict) for one in config.values()):
        return False
    if not isinstance(config.get("run", {}).get("name", ""), str):
        return False
    tables = ("versions", "hardware", "resolved", "origins", "measured")
    return all(isinstance(document.get(name, {}), dict) for name in tables) and (
        isinstance(began, (int, float)) and 0 <= began < 1e11
    )


def _quoted(text: object) -> str:
    """For a shell; double quotes, which every system's shell takes."""
    return f'"{text}"' if any(c in str(text) for c in " ()&;'!$") else str(text)


def _free_name(path: Path) -> str:
    """The run's name with the first number behind it that is not taken."""
    return next(
        f"{path.name}-{n}" for n in range(2, 10_000) if not path.with_name(f"{path.name}-{n}").exists()
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers hang on, as far as they are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """The machine, told without torch; what it trains on is among the resolved values."""
    memory_gb = round(psutil.virtual_memory().total / 2**30, 1)
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": memory_gb,
    }
