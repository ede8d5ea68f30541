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
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from whitetuner.adapters.files import DTYPES
from whitetuner.errors import EXIT_FAILED, UserError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Writes the file beside its place, then renames it; returns its sha256. Folders are made.

    One tensor at a time goes through memory, so that a model larger than what is free can be written from its parts.
    Raises UserError (exit code 1) when the disk is full or not writable; an older file of that name is then still there.
    """
    # large elements first: every tensor then begins at a multiple of its element size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.writing")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for piece in (len(text).to_bytes(8, "little"), text):
                digest.update(piece)
                file.write(piece)
            for name in names:
                raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                digest.update(raw)
                file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder may be what is wrong
            temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        raise UserError(
            "the file could not be written: {reason}",
            where=str(path),
            mend="free {megabytes} MB and try again" if full else "make the folder writable and try again",
            code=EXIT_FAILED,
            reason=error.strerror or error,
            megabytes=(end >> 20) + 1,
        ) from error
    return digest.hexdigest()
