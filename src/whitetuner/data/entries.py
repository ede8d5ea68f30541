"""One cache entry: a safetensors file that says what it belongs to and proves that it is whole.

Written beside and renamed, so that a reader (of this or another process) meets an entry that is whole or none. There is no
fsync per file: after a power cut a file may be short or empty, and reading it says so.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

_numbers = itertools.count()


def write_entry(path: Path, key: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """Writes an entry whole or not at all; returns its bytes. Raises OSError when the disk does not take it."""
    # safetensors refuses tensors that share memory, and views keep more than they show
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = save(owned, metadata={"key": key, "checksum": checksum(owned)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.{next(_numbers)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except PermissionError:
        # Windows: another process reads or writes the same entry right now; equal keys have equal contents
        temporary.unlink(missing_ok=True)
        if not path.exists():
            raise
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return len(data)


def read_entry(path: Path, key: str) -> dict[str, torch.Tensor] | None:
    """The tensors of an entry, dtypes as written; None when it is missing, cut off, changed, or another key's."""
    try:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        told = json.loads(raw[8 : 8 + length])["__metadata__"]
        tensors = load(raw)
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    if told.get("key") != key or told.get("checksum") != checksum(tensors):
        return None
    return tensors


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 over names, dtypes, shapes and bytes: tells every single flipped bit."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
