"""Writing one safetensors file: whole or not at all, and the same bytes for the same content.

The library's own writer puts the metadata into the order of a hash map, which differs from process to process; files of the
same run could then not be compared by their hash. The format is small enough to write it down
(https://github.com/huggingface/safetensors#format): header length, JSON header, bytes of the tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from whitetuner.adapters.files import DTYPES
from whitetuner.errors import EXIT_FAILED, FULL, UserError
from whitetuner.memory.relaid import entries_of

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> str:
    """Writes the file beside its place, then renames it; returns its sha256. Folders are made.

    dtypes: as of `write_whole`. Raises UserError (exit code 1) when the disk is full or not writable; an older file of that
    name is then still there.
    """
    try:
        return write_whole(path, tensors, metadata, dtypes)
    except OSError as error:
        full = error.errno in FULL
        need = sum(entry.num_bytes for entry in entries_of(tensors).values())
        raise UserError(
            "the file could not be written: {reason}",
            where=str(path),
            mend="free {megabytes} MB and try again" if full else "make the folder writable and try again",
            code=EXIT_FAILED,
            reason=error.strerror or error,
            megabytes=(need >> 20) + 1,
        ) from error


def write_whole(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> str:
    """The file whole or not at all, as `write_tensors`. Raises OSError.

    One tensor at a time goes through memory, so that a model larger than what is free can be written from its parts: the
    mapping's `entries` (whitetuner.memory.weights), where it has them, tell the header, and each tensor is asked for once.
    dtypes: of the tensors that are written as something else than they are
    """
    entries, dtypes = entries_of(tensors), dtypes or {}
    kinds = {name: dtypes.get(name, entry.dtype) for name, entry in entries.items()}
    # large elements first: every tensor then begins at a multiple of its element size
    names = sorted(entries, key=lambda name: (-kinds[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + prod(entries[name].shape) * kinds[name].itemsize
        shape = list(entries[name].shape)
        header[name] = {"dtype": _NAMES[kinds[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.writing")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < end + len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with temporary.open("wb") as file:
            for piece in (len(text).to_bytes(8, "little"), text):
                digest.update(piece)
                file.write(piece)
            for name in names:
                tensor = tensors[name].detach().to("cpu", kinds[name]).contiguous()
                assert tensor.shape == entries[name].shape, f"{name} changed its shape"
                raw = tensor.reshape(-1).view(torch.uint8).numpy().data
                digest.update(raw)
                file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # a source that fails in the middle, Ctrl-C: no half file stays
        _drop(temporary)
        raise
    return digest.hexdigest()


def _drop(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # the folder may be what is wrong
        temporary.unlink(missing_ok=True)


def check_written(path: Path, sha256: str) -> None:
    """Reads the whole file again. Raises UserError (exit code 1) unless it is what was written."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise UserError(
            "the file reads back other than it was written",
            where=str(path),
            mend="check the disk, then write it again with `whitetuner export` from the last checkpoint",
            code=EXIT_FAILED,
        )
