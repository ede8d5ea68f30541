"""What a run goes on from, and whether it may. Nothing is written here: a refused resume leaves the run as it was."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whitetuner.checkpoint.store import Checkpoint, Store, read
from whitetuner.config.migrate import CONFIG_FORMAT, refuse_newer
from whitetuner.config.resume import check_resume
from whitetuner.config.schema import Config
from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.runs import events
from whitetuner.runs.best import STATE_FILE, measured
from whitetuner.runs.folder import RunFolder

#: Words that stand for one of a run's own checkpoints.
NAMED = ("latest", "best")


def find_checkpoint(
    resume: str, folder: RunFolder, earlier: Mapping[str, Any], config: Config
) -> tuple[Checkpoint | None, list[events.Event]]:
    """(the checkpoint, None where nothing is saved yet; what is to be said of it).

    resume: "latest", "best" or a checkpoint's folder; earlier: run.json as it is, empty for a new run
    Raises UserError for no checkpoint, a damaged one, another run's, and for changes of the config that a resume cannot take.
    """
    told: list[events.Event] = []
    if resume in NAMED:
        store = Store(folder.checkpoints, earlier.get("run_id", ""), config.save.keep)
        look = store.best if resume == "best" else store.latest
        found = look(lambda error: told.append(events.Message(level="warning", text=str(error))))
        if found is None and resume == "best" and store.found():
            raise none_measured(str(folder.path), "--resume latest")
        if found is None:
            told.append(
                events.Message(level="info", text="nothing is saved in this folder yet: the run starts anew")
            )
            return None, told
    else:
        found = read(_named(resume, folder))
        if found.state.get("run_id") != earlier.get("run_id"):
            raise UserError(
                "this checkpoint belongs to another run",
                where=resume,
                mend="resume it inside its own run folder, or set method.init_from to begin a new run from its adapter",
            )
    told += [events.Message(level="info", text=text) for text in check_resume(_config_of(found), config)]
    return found, told


def checkpoint_at(run: RunFolder, at: int | str | None, where: str) -> Checkpoint:
    """One checkpoint of a run, whole. at: its step, or "best"; None or "latest": the newest. where: what named it.

    Raises UserError for none, or a damaged one.
    """
    run_id = str(run.document()["run_id"])
    there = [int(path.name.rpartition("-")[2]) for path in Store(run.checkpoints, run_id, 0).found()]
    if not there:
        raise UserError(
            "this run has saved nothing yet",
            where=str(run.path),
            mend="let it reach its first checkpoint (save.every)",
        )
    step = there[-1] if at in (None, "latest") else at
    if at == "best":
        best = next(iter(measured(run.checkpoints, run_id)), None)
        if best is None:
            raise none_measured(str(run.path), f"{where} {there[-1]}")
        step = best.step
    if step not in there:
        raise UserError(
            "there is no checkpoint of step {step}",
            where=where,
            mend="this run has: {there}",
            step=step,
            there=", ".join(map(str, there)),
        )
    found = read(run.checkpoints / f"checkpoint-{step}", run_id)
    _config_of(found)
    return found


def _config_of(found: Checkpoint) -> Mapping[str, Any]:
    """The config that it was trained with. Raises UserError where it tells none, or a newer version wrote it."""
    config = found.state.get("config")
    if not isinstance(config, dict):
        raise UserError(
            "the checkpoint does not tell the config it was trained with",
            where=str(found.path),
            mend="it is damaged; take another step",
            code=EXIT_FAILED,
        )
    refuse_newer(found.state.get(CONFIG_FORMAT, 1), str(found.path))
    return config


def none_measured(where: str, instead: str) -> UserError:
    """That "best" stands for nothing here. instead: what to give."""
    return UserError(
        "no checkpoint of this run was measured on held-out pictures, so none is the best",
        where=where,
        mend="give {instead}; a run with validation.share = 0.1 (or more) measures those that are saved where it validates",
        instead=instead,
    )


def _named(resume: str, folder: RunFolder) -> Path:
    """The folder that --resume names. Raises UserError when it is no checkpoint at all."""
    path = Path(resume)
    if (path / STATE_FILE).is_file() or (path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)):
        return path
    own = Store(folder.checkpoints, "", 0).found()
    raise UserError(
        "there is no checkpoint here",
        where=f"--resume {resume}",
        mend="give 'latest' or one of this run's: {own}"
        if own
        else "give 'latest'; this run has saved none yet",
        own=", ".join(str(one) for one in own[-3:]),
    )


def same_data(before: Mapping[str, Any], now: str) -> None:
    """Raises UserError when the data set is not the one the run began with (`prepared.data_hash`).

    before: without it where a fork goes on for the first time, whose data may be other than the first run's
    """
    if before.get("data_hash", now) != now:
        raise UserError(
            "the pictures, captions or masks are not those this run began with",
            where="[data]",
            mend="put them back, or start a new run (another run.name; method.init_from takes the adapter along)",
        )


def same_resolved(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """What `auto` came to must be what the run began with: otherwise other numbers would come out. Raises UserError.

    before: without the shift where a fork goes on for the first time
    """
    for key in ("dtype", "shift", "device_type"):
        if before.get(key, now[key]) != now[key]:
            raise UserError(
                "{key} was {old} when the run began and comes to {new} here",
                where="--resume",
                mend="set it in the config as it was, or start a new run from the adapter (method.init_from)",
                key=key,
                old=before.get(key),
                new=now[key],
            )
