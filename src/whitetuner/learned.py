"""What a run has learned, as files to draw with and to export: the final ones, or those of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from whitetuner.adapters.files import read_safetensors
from whitetuner.checkpoint.store import Checkpoint
from whitetuner.checkpoint.tensorfile import write_whole
from whitetuner.errors import UserError
from whitetuner.family import Family, Part
from whitetuner.resuming import checkpoint_at
from whitetuner.runs.folder import RunFolder
from whitetuner.train.learner import STATE


def no_run(where: str) -> UserError:
    """That --checkpoint has no meaning here."""
    return UserError(
        "--checkpoint names one of a run's own, and this is no run's folder",
        where=where,
        mend="give the folder OUTPUT/NAME of a run, or leave --checkpoint out",
    )


def adapter_files(adapter: Path | None, family: Family) -> dict[str, Path]:
    """Part name -> the file given for it. Of one expert's file the name tells which, and its companion is looked for beside.

    Raises UserError when it cannot be told.
    """
    parts = family.spec.parts(family.options)
    if adapter is None:
        return {}
    if len(parts) == 1:
        return {parts[0].name: adapter}
    mine = [part for part in parts if part.suffix in adapter.stem]
    if len(mine) != 1:
        raise UserError(
            "which expert this file is for cannot be told from its name",
            where=f"--adapter {adapter}",
            mend="name it as it was written, with one of: {suffixes}",
            suffixes=", ".join(part.suffix for part in parts),
        )
    beside = {
        part.name: adapter.with_name(adapter.name.replace(mine[0].suffix, part.suffix)) for part in parts
    }
    return {name: path for name, path in beside.items() if path == adapter or path.is_file()}


def learned_files(
    run: RunFolder, parts: Sequence[Part], kind: str, at: int | str | None, beside: Path
) -> dict[str, Path]:
    """Part -> the adapter's file, or with full training the denoiser's folder.

    at:     None: the final files; else see `checkpoint_at`: as it was validated and previewed, so with optimizer.ema the average
    beside: a folder for files that have to be made, and must be there while they are used
    Raises UserError for what is not there.
    """
    if at is None:
        return {
            part.name: run.final_model(part.name)
            if kind == "full"
            else run.final_adapter(kind, part.file(kind))
            for part in parts
        }
    found = checkpoint_at(run, at, "--checkpoint")
    return {part.name: _of_checkpoint(found, part, kind, beside) for part in parts}


def _of_checkpoint(found: Checkpoint, part: Part, kind: str, beside: Path) -> Path:
    state = f"{STATE}/{part.file('ema').removesuffix('.safetensors')}"
    averages = found.tensors.get(f"{state}.safetensors")
    if kind == "full":
        if averages is not None:
            raise UserError(
                "the running average of a whole model is no folder to draw with before the run has ended",
                where=str(found.path),
                mend="let it end from there (`whitetuner fork RUN --at STEP` with few steps more) and take the final files",
            )
        return found.path / part.name
    file = f"{kind}/{part.file(kind)}"
    if averages is None:
        return found.path / file
    names = found.documents[f"{state}.json"].get("names")
    if not isinstance(names, list) or set(names) - set(found.tensors[file]) or len(names) != len(averages):
        raise UserError(
            "the checkpoint does not tell which factor each running average is of: an earlier version saved it",
            where=str(found.path),
            mend="give --adapter {file}: the factors without their average",
            file=found.path / file,
        )
    made = {name: averages[str(number)] for number, name in enumerate(names)}
    path = beside / part.file(kind)
    write_whole(path, {**found.tensors[file], **made}, read_safetensors(found.path / file)[1])
    return path
