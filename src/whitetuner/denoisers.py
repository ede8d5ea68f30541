"""A whole denoiser on disk, whatever it lies in: a model folder, a component folder, or one file of any layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whitetuner.adapters.files import check_file
from whitetuner.checkpoint.original import Written, known_layout, write_original
from whitetuner.checkpoint.plain import Plain
from whitetuner.checkpoint.tensorfile import check_written, write_tensors
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.memory.relaid import Relaid, open_weights
from whitetuner.memory.weights import TensorFiles, is_fp8_extra
from whitetuner.models import class_name, read_settings
from whitetuner.single_files import told_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Denoiser:
    """state: by diffusers name, read tensor by tensor while it is open; single: it is one file, in this layout."""

    path: Path
    family: str
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    single: bool
    layout: str


@contextmanager
def open_denoiser(path: Path, part: str = "transformer") -> Iterator[Denoiser]:
    """part: of a model folder. Raises UserError when it is no denoiser of a known family, or not whole."""
    if not path.exists():
        raise UserError(
            "there is no such file", where=str(path), mend="give a model folder or a .safetensors file"
        )
    if path.is_dir():
        folder = path / part if (path / part).is_dir() else path
        name = class_name(folder)
        family = next(
            (one for one in registry.FAMILIES if registry.spec(one).transformer_class == name), None
        )
        if family is None:
            raise UserError(
                "no known family uses a {found}",
                where=str(folder),
                mend="known families: {known}",
                found=name,
                known=", ".join(registry.FAMILIES),
            )
        with open_weights(folder) as source:
            yield Denoiser(folder, family, read_settings(folder / "config.json"), source, False, "diffusers")
        return
    check_file(path)
    with TensorFiles([path]) as files:
        shapes = {name: tuple(e.shape) for name, e in files.entries.items() if not is_fp8_extra(name)}
        family, layout, table = layout_of(path, shapes)
        made = {name: place.shape for name, place in table.items()}
        config = told_config(path, registry.keys(family), made, list(shapes))
        yield Denoiser(path, family, config, Relaid(files, table), True, layout)


def layout_of(path: Path, shapes: Mapping[str, Sequence[int]]) -> tuple[str, str, Any]:
    """(family, layout, table) of a denoiser's tensors. Raises UserError when no family knows them."""
    for family in registry.FAMILIES:
        found = known_layout(shapes, registry.keys(family))
        if found is not None:
            return family, *found
    raise UserError(
        "this is no denoiser of a known family (its tensors are named like {name})",
        where=str(path),
        mend="`whitetuner inspect` tells what a file is; known families: {known}",
        name=next(iter(shapes), "-"),
        known=", ".join(registry.FAMILIES),
    )


def write_denoiser(
    out: Path,
    model: Denoiser,
    state: Mapping[str, Tensor],
    layout: str,
    metadata: Mapping[str, str],
) -> Written:
    """Writes a state by diffusers name and reads it again.

    layout: "original": one file at `out`, in the layout of the first release; "diffusers": one file in diffusers names where
    `out` ends in .safetensors, else a component folder with config.json. Raises UserError when it cannot be written.
    """
    keymap = registry.keys(model.family)
    if layout == "original":
        return write_original(out, state, keymap, model.config, metadata=metadata)
    single = out.suffix == ".safetensors"
    file = out if single else out / "diffusion_pytorch_model.safetensors"
    sha256 = write_tensors(file, state, {"format": "pt", **metadata})
    check_written(file, sha256)
    if not single:
        config = {name: value for name, value in model.config.items() if not name.startswith("_name")}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Written(file, len(state), len(state), file.stat().st_size, sha256)


def plain(model: Denoiser, dtype: str | None, additions: Mapping[str, Any] | None = None) -> Plain:
    """The denoiser's tensors as numbers to write. dtype: "fp32", "bf16", "fp16"; None: as they are, fp8 as bf16."""
    return Plain(model.state, None if dtype is None else DTYPES[dtype], additions)
