"""A whole denoiser in the layout of its first release, which ComfyUI's models/diffusion_models has, and back.

One file without prefixes (docs/files.md says which program reads what). Tensors pass through memory one at a time, so neither
writing nor reading needs room for a second model.

    family          in the file                                                          read by
    FLUX.2 Klein    BFL's names; q, k, v fused; halves of the last modulation changed    ComfyUI, diffusers
    Z-Image         q, k, v fused                                                        ComfyUI, diffusers
    Qwen-Image      diffusers' own names; 2511 has one empty tensor more as its mark     ComfyUI, diffusers
    WAN             names of the first release; one file an expert                       ComfyUI, diffusers
    GLM-Image, V2   diffusers' own names                                                 White Tuner (no other program)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whitetuner.checkpoint.tensorfile import check_written, write_tensors
from whitetuner.errors import EXIT_FAILED, UserError
from whitetuner.family import KeyMap
from whitetuner.memory.relaid import Relaid, Table, entries_of, trace
from whitetuner.memory.weights import TensorEntry, is_fp8_extra, read_header

#: What may stand before the names in a file of the original layout.
LEADS = ("", "model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True)
class Written:
    """A model file that was read again after it was written.

    known: how many of its `tensors` are names of the family's original layout, found again by them; all of them
    """

    path: Path
    tensors: int
    known: int
    num_bytes: int
    sha256: str


def to_original(state: Mapping[str, Tensor], keymap: KeyMap, config: Mapping[str, Any]) -> Relaid:
    """A denoiser's tensors by diffusers name -> by original name, made when asked for.

    config: the denoiser's config.json; some models are marked in the file by what it says
    Raises UserError: a name that is not the family's; a fused tensor of which a part is missing.
    """
    marks = marks_of(keymap, config)
    shapes = {name: tuple(entry.shape) for name, entry in entries_of(state).items()}
    return Relaid(state, trace(shapes, lambda rows: {**keymap.to_original(rows), **marks}))


def from_original(source: Mapping[str, Tensor], keymap: KeyMap) -> Relaid:
    """A denoiser's tensors by original name (with or without `model.diffusion_model.`) -> by diffusers name.

    fp8 weights keep their numbers and scales (`Relaid`). Raises UserError as `to_original`.
    """
    return Relaid(source, original_table(entries_of(source), keymap))


def original_table(entries: Mapping[str, TensorEntry], keymap: KeyMap) -> Table:
    """How each tensor by diffusers name is made of those of a file in the original layout; scales of fp8 weights aside."""
    unused = {lead + name for name in getattr(keymap, "unused", ()) for lead in LEADS}
    shapes = {
        name: tuple(entry.shape)
        for name, entry in entries.items()
        if name not in unused and not is_fp8_extra(name)
    }
    return trace(shapes, keymap.from_original)


def known_layout(shapes: Mapping[str, Sequence[int]], keymap: KeyMap) -> tuple[str, Table] | None:
    """("diffusers" or "original", how each tensor by diffusers name is made) of a file; None: not this family's.

    Raises UserError for a file that is the family's by its names, but not whole (`trace`).
    """
    unused = {lead + name for name in getattr(keymap, "unused", ()) for lead in LEADS}
    kept = {name: shape for name, shape in shapes.items() if name not in unused and not is_fp8_extra(name)}
    names = {name: torch.empty(0) for name in kept}
    for layout, convert in (("diffusers", keymap.to_original), ("original", keymap.from_original)):
        try:
            convert(names)
        except KeyError:  # its names, but a part is missing: trace says which
            pass
        except UserError:
            continue
        if kept:
            return layout, trace(kept, dict if layout == "diffusers" else keymap.from_original)
    return None


def marks_of(keymap: KeyMap, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Empty tensors by which ComfyUI tells a model from another of the same shapes."""
    marks = getattr(keymap, "marks", None)
    return {} if marks is None else dict(marks(config))


def write_original(
    path: Path,
    state: Mapping[str, Tensor],
    keymap: KeyMap,
    config: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    keep: Sequence[str] = (),
) -> Written:
    """Writes a denoiser, given by diffusers name, as one file in the original layout, and reads it again.

    state: tensors on any device, each asked for when its turn comes; a mapping with `entries` (TensorFiles, Relaid) is read
        tensor by tensor
    dtype: of floating tensors in the file, rounded once; None: as they are
    keep:  fnmatch patterns of diffusers names that stay as they are
    Raises UserError as `to_original`, and when the file cannot be written or reads back as something else.
    """
    relaid = to_original(state, keymap, config)
    dtypes = {}
    if dtype is not None:
        for name, place in relaid.table.items():
            kept = any(fnmatchcase(piece.source, one) for piece in place.pieces for one in keep)
            if relaid.entries[name].dtype.is_floating_point and not kept:
                dtypes[name] = dtype
    sha256 = write_tensors(path, relaid, {"format": "pt", **(metadata or {})}, dtypes)
    check_written(path, sha256)
    known = known_names(path, keymap, set(state))
    return Written(path, len(relaid), known, path.stat().st_size, sha256)


def known_names(path: Path, keymap: KeyMap, wanted: set[str]) -> int:
    """Tensors of a file in the original layout that mean something in it.

    wanted: diffusers names that the file must give, all and no others. Raises UserError (exit code 1) otherwise.
    """
    entries = read_header(path)
    table = original_table(entries, keymap)
    if set(table) != wanted:
        raise UserError(
            "the written file has other tensors than the model: {names}",
            where=str(path),
            mend="write it again with `whitetuner export` from the last checkpoint",
            code=EXIT_FAILED,
            names=", ".join(sorted(set(table) ^ wanted)[:5]),
        )
    read = {piece.source for place in table.values() for piece in place.pieces}
    return sum(1 for name, entry in entries.items() if name in read or 0 in entry.shape)
