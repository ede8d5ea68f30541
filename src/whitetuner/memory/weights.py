"""Tensors of a model as they lie in its safetensors files: found, checked and read one at a time.

A file is checked against its own header before anything is read, so that a broken download is told in one
sentence instead of failing, or worse not failing, in the middle of a load. Pickle files are never opened:
they can run code.
Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON header, raw
        tensors).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from whitetuner.errors import UserError

#: In a component folder in place of weights: which rows of which tensors of one file elsewhere its tensors are
#: (whitetuner.memory.relaid).
TABLE = "weights.json"
#: Stems under which diffusers and transformers store the weights of a component folder.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
#: How the scale of a ready-made fp8 weight is named beside `X.weight` (ComfyUI scaled files, fp8 exporters).
SCALE_NAMES = ("scale_weight", "weight_scale")
#: Companions of such files that a weight-only layer does not need.
FP8_EXTRAS = ("scaled_fp8", "*.scaled_fp8", "*.scale_input", "*.input_scale", "*.comfy_quant")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of one tensor: its file, shape, dtype and size in bytes."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype
    num_bytes: int


def is_fp8_extra(name: str) -> bool:
    """Whether a tensor stands beside fp8 weights: their scales, and what other programs note of them."""
    return name.endswith(tuple(f".{one}" for one in SCALE_NAMES)) or any(
        fnmatchcase(name, pattern) for pattern in FP8_EXTRAS
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component folder (all shards), or the file itself.

    Raises UserError when there are none, when a shard of the index is missing, or when there are only
    pickles.
    """
    if folder.is_file():
        if folder.suffix in _PICKLES:
            raise _pickle_error(folder)
        return [folder]
    if (folder / TABLE).is_file():
        return [Path(json.loads((folder / TABLE).read_text(encoding="utf-8"))["file"])]
    if not folder.is_dir():
        raise UserError(
            "there is no model folder here",
            where=str(folder),
            mend="check the path; a component folder holds config.json and *.safetensors",
        )
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        return _indexed(_preferred(indices))
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return [_preferred(files)]
    pickles = sorted(p for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise _pickle_error(pickles[0])
    raise UserError(
        "the folder holds no weights (*.safetensors)",
        where=str(folder),
        mend="download the whole component folder again",
    )


def _preferred(paths: list[Path]) -> Path:
    """The plain name (model.safetensors) before variants (model.fp16.safetensors)."""
    names = {path.name.removesuffix(".index.json").removesuffix(".safetensors"): path for path in paths}
    for stem in STEMS:
        if stem in names:
            return names[stem]
    return paths[0]


def _indexed(index: Path) -> list[Path]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(
            "the index of the weights cannot be read ({error})",
            where=str(index),
            mend="download this file again",
            error=error,
        ) from error
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            "{count} of {total} weight files named in the index are missing: {names}",
            where=str(index),
            mend="download the missing files into the same folder",
            count=len(missing),
            total=len(shards),
            names=first_five(missing),
        )
    return [index.parent / name for name in shards]


def _pickle_error(path: Path) -> UserError:
    return UserError(
        "the weights are a pickle file, which can run any code when it is opened; it is not read",
        where=str(path),
        mend="get the safetensors version, or convert it where you trust the file: python -c "
        '"import torch; from safetensors.torch import save_file; '
        " save_file(torch.load('{name}', weights_only=True), "
        "'{stem}.safetensors')\"",
        name=path.name,
        stem=path.stem,
    )


def first_five(names: list[str]) -> str:
    """'a, b, c, d, e and 7 more'."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, from its header alone.

    Raises UserError when the file is shorter or longer than its header promises, or is no safetensors file.
    """
    actual = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= 100_000_000 or 8 + length > actual:
            raise UserError(
                "not a whole safetensors file: {actual} bytes, and no header that fits into them",
                where=str(path),
                mend="download it again (an interrupted download, or a web page saved under this name)",
                actual=actual,
            )
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers or brackets without end
            raise UserError(
                "not a safetensors file: its header is not JSON", where=str(path), mend="download it again"
            ) from error
    if not isinstance(header, dict):
        raise UserError(
            "not a safetensors file: its header is no table", where=str(path), mend="download it again"
        )
    words = header.pop("__metadata__", None) or {}
    if not isinstance(words, dict) or not all(isinstance(text, str) for text in words.values()):
        raise UserError(
            "not a safetensors file: its notes are no table of texts",
            where=str(path),
            mend="download it again",
        )
    entries: dict[str, TensorEntry] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise UserError(
                "not a safetensors file: its header tells no shape of {name}",
                where=str(path),
                mend="download it again",
                name=name[:200],
            )
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            raise UserError(
                "tensor {name} has the number format {dtype}, which is not known here",
                where=str(path),
                mend="use a bf16, fp16, fp32 or fp8 version of the model",
                name=name[:200],
                dtype=entry["dtype"],
            )
        dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        known = _counts(shape) and _counts(offsets) and len(offsets) == 2
        num_bytes = prod(shape) * dtype.itemsize if known else -1
        if not known or offsets[1] - offsets[0] != num_bytes or num_bytes > actual:
            raise UserError(
                "tensor {name} does not have the size that its shape asks for",
                where=str(path),
                mend="download it again",
                name=name[:200],
            )
        entries[name] = TensorEntry(path, torch.Size(shape), dtype, num_bytes)
        places.append((offsets[0], offsets[1], name))
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            raise UserError(
                "tensor {name} does not lie where the one before it ends: the header is damaged",
                where=str(path),
                mend="download it again",
                name=name[:200],
            )
        end = stop
    if actual != 8 + length + end:
        raise UserError(
            "the file is cut off or damaged: it has {actual} bytes, its header promises {expected}",
            where=str(path),
            mend="download it again",
            actual=actual,
            expected=8 + length + end,
        )
    return entries


def _counts(values: object) -> bool:
    """A list of whole numbers from 0 on that a tensor can have."""
    return isinstance(values, list) and all(type(one) is int and 0 <= one < 1 << 62 for one in values)


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of one or more safetensors files by name, each read when it is asked for.

    A tensor given out may lie in the mapped file: copy what is to live on. Use as a context manager.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.entries: dict[str, TensorEntry] = {}
        for path in files:
            self.entries.update(read_header(path))
        self._stack = ExitStack()
        self._open: dict[Path, safe_open] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self.entries[name].file
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(
                    safe_open(str(file), framework="pt", device="cpu")
                )
            return self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                "this is no whole safetensors file ({reason}; {size} bytes)",
                where=str(file),
                mend="download or copy it again",
                reason=str(error)[:300],
                size=file.stat().st_size,
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries
