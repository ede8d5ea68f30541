"""Checkpoints: written beside, hashed, then renamed; rotated; never loaded when torn.

Layout of one (docs/run-folder.md):
    checkpoint-500/{lokr/lokr.safetensors, accelerate_state/..., training_state.json}
training_state.json holds the step, the run's id, the sha256 of every other file and one of itself. It is part of the folder
that is renamed into place, so a checkpoint that can be seen under its final name was written whole; the hashes tell later
damage.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from whitetuner.checkpoint.tensorfile import write_whole
from whitetuner.errors import EXIT_FAILED, FULL, UserError
from whitetuner.memory.relaid import entries_of
from whitetuner.memory.weights import read_header
from whitetuner.runs.best import HELD_OUT_LOSS, POINTER, STATE_FILE, measured, point_at_best, state_of

FORMAT = 1
#: Key of the document's hash over all its other values.
OWN_HASH = "sha256"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors and JSON documents by their path inside the folder, and the state document."""

    path: Path
    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    documents: Mapping[str, Any]


class Saved(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint's file, each read when it is asked for: a model's need not fit into memory twice.

    The file is open only while one is read, so that the folder can be renamed and removed on every system.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.entries = file, read_header(file)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.entries:
            raise KeyError(name)
        with safe_open(str(self.file), framework="pt", device="cpu") as source:
            tensor: torch.Tensor = source.get_tensor(name)
        return tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be trusted; the message says why."""


class Store:
    """The checkpoints of one run.

    folder: OUTPUT/NAME/checkpoints; run_id: only checkpoints of this run are counted and rotated; keep: how many of the newest
    stay (0: all), and beside them the best
    """

    def __init__(self, folder: Path, run_id: str, keep: int) -> None:
        self.folder, self.run_id, self.keep = folder, run_id, keep

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        documents: Mapping[str, Any],
        state: Mapping[str, Any],
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Writes checkpoint-STEP atomically, then removes the oldest beyond `keep`, never the best.

        state: more of its state document; HELD_OUT_LOSS there: the loss on held-out pictures at this step, or None
        Raises UserError (exit code 1) when the disk is full or not writable; what was saved before stays as it was.
        """
        final, temporary = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.writing"
        needed = (
            sum(entry.num_bytes for group in tensors.values() for entry in entries_of(group).values()) + 65536
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            digests: dict[str, str] = {}
            for name, group in tensors.items():
                digests[name] = write_whole(temporary / name, group, {"format": "pt", **(metadata or {})})
            for name, document in documents.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(document, indent=1, sort_keys=True), encoding="utf-8")
            files = {}
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    name = path.relative_to(temporary).as_posix()
                    files[name] = {
                        "sha256": digests.get(name) or _sha256(path),
                        "bytes": path.stat().st_size,
                    }
            whole = {**state, "format": FORMAT, "step": step, "run_id": self.run_id, "files": files}
            whole[OWN_HASH] = _own_hash(whole)
            (temporary / STATE_FILE).write_text(json.dumps(whole, indent=1, sort_keys=True), encoding="utf-8")
            for path in temporary.rglob("*"):
                _sync(path)
            _sync(temporary)
            replaced = self.folder / f".checkpoint-{step}.replaced"
            if final.exists():  # a damaged one of the same step, or a restart on another branch of time
                final.rename(replaced)
            temporary.rename(final)
            _sync(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
            point_at_best(self.folder, self.run_id)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if _is_disk_full(error):
                raise UserError(
                    "the disk is full: the checkpoint of step {step} needs {needed} MB; earlier checkpoints are intact",
                    where=str(self.folder),
                    mend="free some space, then go on with --resume latest (or lower save.keep)",
                    code=EXIT_FAILED,
                    step=step,
                    needed=max(1, needed >> 20),
                ) from error
            raise UserError(
                "the checkpoint of step {step} could not be written ({reason}); earlier checkpoints are intact",
                where=str(self.folder),
                mend="make the folder writable, then go on with --resume latest",
                code=EXIT_FAILED,
                step=step,
                reason=error,
            ) from error
        self._rotate(final)
        return final

    def adopt(self, checkpoint: Checkpoint, state: Mapping[str, Any], metadata: Mapping[str, str]) -> Path:
        """A copy of another run's checkpoint, from now on this run's; state: what of its state document is another now.

        What the other run measured is none of this one's, whose pictures and noise may be others.
        Raises UserError as `save`.
        """
        kept = {
            key: value
            for key, value in checkpoint.state.items()
            if key not in ("files", "run_id", "format", "step", OWN_HASH)
        }
        return self.save(
            checkpoint.step,
            checkpoint.tensors,
            checkpoint.documents,
            {**kept, HELD_OUT_LOSS: None, **state},
            metadata,
        )

    def found(self) -> list[Path]:
        """Checkpoint folders, oldest step first, whole or not."""
        numbered = []
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                match = re.fullmatch(r"checkpoint-(\d+)", path.name)
                if match and path.is_dir():
                    numbered.append((int(match[1]), path))
        return [path for _, path in sorted(numbered)]

    def latest(self, warn: Callable[[UserError], None]) -> Checkpoint | None:
        """The newest whole checkpoint of this run; damaged ones are told to `warn` and passed over. None if there is none."""
        for path in reversed(self.found()):
            try:
                return read(path, self.run_id)
            except DamagedCheckpoint as error:
                warn(error)
        return None

    def best(self, warn: Callable[[UserError], None]) -> Checkpoint | None:
        """The whole checkpoint with the least held-out loss; damaged ones as in `latest`. None if none was measured."""
        for one in measured(self.folder, self.run_id):
            try:
                return read(one.path, self.run_id)
            except DamagedCheckpoint as error:
                warn(error)
        return None

    def set_aside_after(self, step: int) -> list[Path]:
        """Renames this run's checkpoints beyond `step`: a run that goes on from an earlier one leaves them behind, and
        "latest" must not come back to them. Nothing is deleted. Returns their new places.
        """
        moved = []
        for path in self.found():
            if int(path.name.rpartition("-")[2]) > step and _run_id(path) == self.run_id:
                number = 0
                while (
                    target := path.with_name(f"left-{path.name}" + (f".{number}" if number else ""))
                ).exists():
                    number += 1
                path.rename(target)
                moved.append(target)
        point_at_best(self.folder, self.run_id)
        return moved

    def _rotate(self, newest: Path) -> None:
        if self.keep <= 0:
            return
        own = [path for path in self.found() if path != newest and _run_id(path) == self.run_id]
        best = [one.path for one in measured(self.folder, self.run_id)[:1]]
        for path in own[: max(0, len(own) - (self.keep - 1))]:
            if path in best:
                continue
            gone = path.with_name(f".{path.name}.removing")
            path.rename(
                gone
            )  # first out of sight: a kill in the middle of rmtree must not leave half a checkpoint
            shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what an interrupted save or rotation left."""
        for path in self.folder.glob(f".{POINTER}.*.writing"):
            path.unlink(missing_ok=True)
        for path in self.folder.glob(".checkpoint-*"):
            if path.suffix in (".writing", ".replaced", ".removing"):
                shutil.rmtree(path, ignore_errors=True)


def read(path: Path, run_id: str | None = None) -> Checkpoint:
    """A checkpoint after every hash was checked. Raises DamagedCheckpoint with the reason."""

    def damaged(what: str, **values: object) -> DamagedCheckpoint:
        return DamagedCheckpoint(
            what,
            where=str(path),
            mend="--resume latest takes the newest whole one",
            code=EXIT_FAILED,
            **values,
        )

    state_file = path / STATE_FILE
    if not state_file.is_file():
        raise damaged("this is no whole checkpoint: training_state.json is missing")
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        files, step = dict(state["files"]), int(state["step"])
        known = {name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
        if not known:
            raise ValueError("it names no files")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise damaged("training_state.json is damaged ({reason})", reason=error) from error
    if state.get(OWN_HASH) != _own_hash(state):
        raise damaged("{name} was changed after it was saved (its hash differs)", name=STATE_FILE)
    if run_id is not None and state.get("run_id") != run_id:
        raise damaged("this checkpoint belongs to another run ({other})", other=state.get("run_id"))
    tensors: dict[str, Mapping[str, torch.Tensor]] = {}
    documents: dict[str, Any] = {}
    for name, (size, digest) in known.items():
        file = path / name
        try:
            inside, there = file.resolve().is_relative_to(path.resolve()), file.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, no name at all, links in a ring
            inside, there = True, False
        if not inside:
            raise damaged("it names a file outside of itself ({name})", name=name)
        if not there:
            raise damaged("{name} is missing", name=name)
        if file.stat().st_size != size:
            raise damaged(
                "{name} is torn: {have} of {want} bytes", name=name, have=file.stat().st_size, want=size
            )
        if _sha256(file) != digest:
            raise damaged("{name} was changed after it was saved (its hash differs)", name=name)
        try:  # the hashes agree, and whoever wrote them may have meant harm
            if file.suffix == ".safetensors":
                tensors[name] = Saved(file)
            elif file.suffix == ".json":
                documents[name] = json.loads(file.read_text(encoding="utf-8"))
        except (UserError, ValueError, RecursionError) as error:
            raise damaged("{name} cannot be read ({reason})", name=name, reason=error) from error
    return Checkpoint(path, step, state, tensors, documents)


def _own_hash(state: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != OWN_HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _run_id(path: Path) -> str | None:
    return state_of(path).get("run_id")  # None: not one of ours to count or remove


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Bytes (or, on POSIX, directory entries) onto the disk: a power cut after the rename must find them."""
    if path.is_dir():
        if os.name == "nt":
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    return "No space left" in str(error) or "os error 28" in str(
        error
    )  # safetensors reports the errno as text
