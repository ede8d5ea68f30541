"""The files that a finished run is for: the averaged adapter, for ComfyUI (under the run's name too) and for diffusers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from whitetuner.checkpoint.export import export_adapter
from whitetuner.config.schema import Config
from whitetuner.family import KeyMap
from whitetuner.runs.folder import RunFolder
from whitetuner.train.team import Team


def write_final(
    config: Config, team: Team, keys: KeyMap, folder: RunFolder, metadata: Mapping[str, str]
) -> tuple[Path, ...]:
    """-> (final/NAME.safetensors, final/KIND/KIND.safetensors, final/KIND/KIND_diffusers.safetensors), for each part.

    Raises UserError when one cannot be written.
    """
    kind, final = config.method.kind, folder.final
    written: list[Path] = []
    with team.averaged():
        for learner in team.learners:
            part = learner.part
            write = partial(
                export_adapter,
                learner.adapter_tensors(),
                learner.adapter.settings,
                keys,
                metadata=metadata,
                dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[config.save.dtype],
            )
            named = final / part.file(config.run.name)
            plain = final / kind / part.file(kind)
            diffusers = final / kind / part.file(kind, "diffusers")
            write(path=plain, naming="comfyui")
            write(path=diffusers, naming="diffusers")
            _same_file(plain, named)
            written += [named, plain, diffusers]
    return tuple(written)


def _same_file(source: Path, target: Path) -> None:
    """target becomes a hard link to source, or a copy where links are not to be had."""
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # FAT, some network drives
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
