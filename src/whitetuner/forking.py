"""A new run that begins at a checkpoint of another, with some settings changed: two ways tried from one point.

The other run is only read. The new one owns a copy of the checkpoint and goes on from it as after a resume.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from whitetuner.checkpoint.store import Store
from whitetuner.config.load import Loaded, dump_config, load_config
from whitetuner.config.resume import check_fork
from whitetuner.errors import UserError
from whitetuner.resolve import choose_dtype
from whitetuner.resuming import checkpoint_at
from whitetuner.runs.folder import RunFolder

#: What `auto` came to in the other run and hangs on data and noise: the new run finds its own.
_NOT_TAKEN = ("data_hash", "shift", "items", "sizes", "batches_per_epoch", "steps")


def fork(run: Path, at: int | str | None, overrides: Sequence[str] = ()) -> tuple[Loaded, list[str]]:
    """Makes the new run's folder, ready for `--resume latest`; (its config, what was changed in words).

    run: the other run's folder; at: see `checkpoint_at`; overrides: as of --set; without run.name the name is the other's with
    -fork-STEP.
    Raises UserError for no such checkpoint, a damaged one, changes that a checkpoint cannot take, a folder that is in use.
    """
    source = RunFolder(run)
    source.require()
    document = source.document()
    found = checkpoint_at(source, at, "--at")
    given = {one.partition("=")[0].strip() for one in overrides}
    # Beside the other run, wherever this is typed. JSON's texts are TOML's, backslashes of Windows included.
    own = {"run.name": _free(run, found.step), "run.output_dir": str(run.parent)}
    more = [f"{key}={json.dumps(value)}" for key, value in own.items() if key not in given]
    loaded = _without_resume(load_config(source.config_file, [*overrides, *more]))
    config = loaded.config
    changed = check_fork(found.state["config"], config)
    if config.run.steps is not None and config.run.steps <= found.step:
        raise UserError(
            "step {step} is reached already: run.steps is {steps}",
            where="--at",
            mend="add --set run.steps=MORE, or give an earlier step",
            step=found.step,
            steps=config.run.steps,
        )
    path = Path(config.run.output_dir) / config.run.name
    if path.exists() and any(path.iterdir()):
        raise UserError(
            "there is something in {path} already",
            where="run.name",
            mend='add --set run.name="ANOTHER NAME"',
            path=path,
        )
    resolved = {k: v for k, v in document.get("resolved", {}).items() if k not in _NOT_TAKEN}
    if config.memory.dtype != "auto":  # else the resume would refuse what this made
        asked = str(choose_dtype(config.memory.dtype, torch.device("cpu"))).removeprefix("torch.")
        if resolved.get("dtype", asked) != asked:
            raise UserError(
                "the other run trains in {old}, and a checkpoint goes on in the numbers it was made in",
                where="memory.dtype",
                mend="leave it as it was, or start a new run from the adapter (method.init_from)",
                old=resolved["dtype"],
            )
    with RunFolder.open(path, resume=True, config=loaded.path) as folder:
        origin = {"run": os.path.relpath(run.resolve(), path.resolve()), "step": found.step}
        # The checkpoint first: a folder with run.json and nothing to go on from would start anew.
        run_id = uuid.uuid4().hex
        Store(folder.checkpoints, run_id, config.save.keep).adopt(found, loaded.state(), loaded.metadata())
        folder.begin(
            dump_config(config),
            loaded.document(),
            run_id=run_id,
            origins=dict(loaded.origins),
            forked_from={**origin, "run_id": document["run_id"]},
            resolved=resolved,
        )
    return replace(loaded, path=folder.config_file), changed


def _free(run: Path, step: int) -> str:
    base = f"{run.resolve().name}-fork-{step}"
    names = (base, *(f"{base}-{number}" for number in range(2, 10_000)))
    return next(name for name in names if not run.resolve().with_name(name).exists())


def _without_resume(loaded: Loaded) -> Loaded:
    """Without a wish to resume that the other run's file may hold: it named a checkpoint of that run."""
    run = loaded.config.run.model_copy(update={"resume": None})
    return replace(loaded, config=loaded.config.model_copy(update={"run": run}))
