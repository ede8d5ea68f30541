"""The files that a finished run is for: what was learned (averaged), for ComfyUI (under the run's name too) and for diffusers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from whitetuner.checkpoint.export import export_adapter
from whitetuner.checkpoint.original import write_original
from whitetuner.checkpoint.tensorfile import write_tensors
from whitetuner.config.schema import Config
from whitetuner.family import KeyMap
from whitetuner.memory.relaid import entries_of
from whitetuner.runs.files import write_atomically
from whitetuner.runs.folder import RunFolder
from whitetuner.train.learner import Learner
from whitetuner.train.team import Team
from whitetuner.train.whole import WholeLearner
from whitetuner.train.whole_sharded import WholeSharded

#: Bytes of a file of a model in diffusers layout at most, as diffusers' own.
SHARD_BYTES = 10 * 10**9
_STEM = "diffusion_pytorch_model"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_final(
    config: Config,
    team: Team,
    keys: KeyMap,
    folder: RunFolder,
    metadata: Mapping[str, str],
    writes: bool = True,
) -> tuple[Path, ...]:
    """-> for each part (final/NAME.safetensors, final/KIND/KIND.safetensors, final/KIND/KIND_diffusers.safetensors); of full
    training (final/NAME.safetensors, final/comfyui/NAME.safetensors, final/PART: its folder in diffusers layout).

    writes: whether this rank is the one that does; of a sharded model others take part. Raises UserError when one cannot be
    written.
    """
    written: list[Path] = []
    with team.averaged():
        for learner in team.learners:
            if not writes:
                if isinstance(learner, WholeSharded):
                    learner.weights()  # this rank's share, for the one that writes
            elif isinstance(learner, (WholeLearner, WholeSharded)):
                written += _whole(config, learner, keys, folder, metadata)
            else:
                assert isinstance(learner, Learner)
                written += _adapter(config, learner, keys, folder, metadata)
    return tuple(written)


def _adapter(
    config: Config, learner: Learner, keys: KeyMap, folder: RunFolder, metadata: Mapping[str, str]
) -> list[Path]:
    kind, final, part = config.method.kind, folder.final, learner.part
    write = partial(
        export_adapter,
        learner.adapter_tensors(),
        learner.adapter.settings,
        keys,
        metadata=metadata,
        dtype=_DTYPES[config.save.dtype],
    )
    named = final / part.file(config.run.name)
    plain = final / kind / part.file(kind)
    diffusers = final / kind / part.file(kind, "diffusers")
    write(path=plain, naming="comfyui")
    write(path=diffusers, naming="diffusers")
    _same_file(plain, named)
    return [named, plain, diffusers]


def _whole(
    config: Config,
    learner: WholeLearner | WholeSharded,
    keys: KeyMap,
    folder: RunFolder,
    metadata: Mapping[str, str],
) -> list[Path]:
    """Weights go out as they were trained, bf16 or float32; save.dtype = "bf16" makes float32 ones smaller."""
    state, described = learner.weights(), learner.described()
    dtype = torch.bfloat16 if config.save.dtype == "bf16" else None
    layout = folder.final / learner.part.name
    write_diffusers(layout, state, described, metadata, dtype)
    file = learner.part.file(config.run.name)
    comfyui, named = folder.final / "comfyui" / file, folder.final / file
    write_original(comfyui, state, keys, described, metadata=metadata, dtype=dtype)
    _same_file(comfyui, named)
    return [named, comfyui, layout]


def write_diffusers(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    described: Mapping[str, Any],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A denoiser as `from_pretrained` reads it: config.json and one file, or several with their index, written one after the
    other. described: config.json. dtype: of floating tensors; None: as they are. Raises UserError.
    """
    entries = entries_of(state)
    dtypes = {} if dtype is None else {n: dtype for n, one in entries.items() if one.dtype.is_floating_point}
    sizes = {n: prod(one.shape) * dtypes.get(n, one.dtype).itemsize for n, one in entries.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    for path in folder.glob(f"{_STEM}*"):
        path.unlink()  # of an earlier end of this run, perhaps in another number of files
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"{_STEM}.safetensors"
        if len(shards) > 1:
            file = f"{_STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        where.update(dict.fromkeys(names, file))
        of_shard = {name: dtypes[name] for name in names if name in dtypes}
        write_tensors(
            folder / file, {name: state[name] for name in names}, {"format": "pt", **metadata}, of_shard
        )
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_atomically(folder / f"{_STEM}.safetensors.index.json", json.dumps(index, indent=2))
    write_atomically(folder / "config.json", json.dumps(described, indent=2, sort_keys=True))


def _same_file(source: Path, target: Path) -> None:
    """target becomes a hard link to source, or a copy where links are not to be had."""
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # FAT, some network drives
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
