"""Tensors under the names of another layout, each made of rows of others when it is asked for.

Layouts of one model differ in names, in what is fused (query, key and value below each other) and in the order of rows. All
of that is a table: which rows of which tensors a tensor is. The table is made once by converting row numbers in place of
weights, so the code that knows the layout is written for plain dicts and no tensor of size is touched; with it a model of any
size is read or written in the other layout one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whitetuner.errors import UserError
from whitetuner.memory.weights import SCALE_NAMES, TABLE, TensorEntry, TensorFiles, weight_files

#: A layout's way to another: whole states by name, as a family's KeyMap has two.
Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Piece:
    """Rows start to stop (the first dimension) of a tensor of the source."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """A tensor of the new layout: the pieces of which it is made, one below the other, seen in this shape."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


Table = dict[str, Place]


def trace(shapes: Mapping[str, Sequence[int]], convert: Convert) -> Table:
    """How `convert` makes each of its tensors from those of these names and shapes.

    Empty tensors that it adds (marks) have no pieces. Raises UserError as `convert` does; for a tensor whose partner is not
    there (a key without its query); and where rows would be lost.
    """
    numbered: dict[str, Tensor] = {}
    starts: list[int] = []
    names = list(shapes)
    end = 0
    for name in names:
        rows = _rows(shapes[name])
        starts.append(end)
        numbered[name] = torch.arange(end, end + rows).reshape([rows] + [1] * (len(shapes[name]) > 1))
        end += rows + 1  # a gap, so that rows of two tensors never follow each other
    try:
        converted = convert(numbered)
    except KeyError as error:
        raise UserError(
            "{name} is missing",
            mend="the file is not whole; download it again",
            name=error.args[0],
        ) from error
    firsts = torch.tensor(starts)
    table: Table = {}
    used = 0
    for name, made in converted.items():
        flat = made.flatten()
        used += len(flat)
        pieces = _pieces(flat, firsts, names)
        table[name] = Place(_shape(name, len(flat), [shapes[p.source] for p in pieces]), pieces)
    if used != end - len(names):
        taken = {piece.source for place in table.values() for piece in place.pieces}
        lost = [name for name in names if name not in taken and 0 not in shapes[name]]
        raise UserError(
            "{name} is left over: it is there under two names, or its query, key and value are not all there",
            mend="give a file as it was released, in one naming",
            name=lost[0] if lost else names[0],
        )
    return table


def _pieces(flat: Tensor, firsts: Tensor, names: Sequence[str]) -> tuple[Piece, ...]:
    if not len(flat):
        return ()
    breaks = (torch.nonzero(flat[1:] != flat[:-1] + 1).flatten() + 1).tolist()
    found = []
    for start, stop in zip([0, *breaks], [*breaks, len(flat)]):
        number = int(torch.searchsorted(firsts, flat[start], right=True)) - 1
        first = int(flat[start]) - int(firsts[number])
        found.append(Piece(names[number], first, first + stop - start))
    return tuple(found)


def _rows(shape: Sequence[int]) -> int:
    return int(shape[0]) if len(shape) else 1


def _shape(name: str, rows: int, sources: list[Sequence[int]]) -> tuple[int, ...]:
    """The first dimension counts the rows; the others are those of the sources, which must agree on them."""
    if not sources:
        return (rows,)
    rest = {tuple(shape[1:]) for shape in sources}
    if len(rest) > 1:
        raise UserError(
            "the parts of {name} differ in width: {widths}",
            mend="the file is damaged; download it again",
            name=name,
            widths=", ".join(str(one) for one in sorted(rest)),
        )
    return () if not len(sources[0]) else (rows, *rest.pop())


class Relaid(Mapping[str, Tensor]):
    """The source's tensors in the other layout, each read and put together when it is asked for.

    source: by name; `entries` (whitetuner.memory.weights) tells shapes and dtypes without reading, where it has them
    A tensor that is one whole tensor of the source is that tensor itself, not a copy. fp8 weights with a scale beside them
    (X.scale_weight, X.weight_scale) keep their numbers: the scale is relaid with the rows, as Y.scale_weight.
    """

    def __init__(self, source: Mapping[str, Tensor], table: Table) -> None:
        self.source, self.table = source, table
        known = entries_of(source)
        self.entries: dict[str, TensorEntry] = {}
        self._scales: dict[str, str] = {}
        for name, place in table.items():
            parts = [known[piece.source] for piece in place.pieces]
            dtype = parts[0].dtype if parts else torch.float32
            for part in parts[1:]:
                dtype = torch.promote_types(dtype, part.dtype) if part.dtype != dtype else dtype
            file = parts[0].file if parts else Path()
            size = prod(place.shape) * dtype.itemsize
            self.entries[name] = TensorEntry(file, torch.Size(place.shape), dtype, size)
            stem = name.removesuffix("weight")
            if parts and stem != name and all(_scale_name(p.source, known) for p in place.pieces):
                rows = _rows(place.shape)
                self._scales[stem + SCALE_NAMES[0]] = name
                self.entries[stem + SCALE_NAMES[0]] = TensorEntry(
                    file, torch.Size([rows]), torch.float32, 4 * rows
                )

    def __getitem__(self, name: str) -> Tensor:
        if name in self._scales:
            return self._scale(self.table[self._scales[name]])
        place, dtype = self.table[name], self.entries[name].dtype
        read = {source: self.source[source] for source in dict.fromkeys(p.source for p in place.pieces)}
        parts = [_part(read[piece.source], piece, dtype) for piece in place.pieces]
        if not parts:
            return torch.empty(place.shape, dtype=dtype)
        # fp8 tensors have no kernel for cat on every device; their bytes have
        whole = parts[0] if len(parts) == 1 else _cat(parts)
        return whole.reshape(place.shape)

    def _scale(self, place: Place) -> Tensor:
        """(rows,) float32, whatever the source has: one number, or one a row."""
        parts = []
        for piece in place.pieces:
            name = _scale_name(piece.source, entries_of(self.source))
            assert name is not None
            scale = self.source[name].float().flatten()
            parts.append(scale.expand(piece.stop) if scale.numel() == 1 else scale[: piece.stop])
            parts[-1] = parts[-1][piece.start :]
        return torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries


def _part(tensor: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    if (piece.start, piece.stop) != (0, _rows(tensor.shape)):
        tensor = tensor[piece.start : piece.stop]
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].dtype.itemsize == 1:
        return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.cat(list(parts))


def _scale_name(weight: str, source: Mapping[str, Any]) -> str | None:
    stem = weight.removesuffix("weight")
    return next((stem + scale for scale in SCALE_NAMES if stem + scale in source), None)


def write_table(folder: Path, file: Path, table: Table) -> None:
    """Makes a component folder read its weights from a single file elsewhere."""
    stat = file.stat()
    document = {
        "file": str(file.resolve()),
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "tensors": {
            name: [list(place.shape), [[p.source, p.start, p.stop] for p in place.pieces]]
            for name, place in table.items()
        },
    }
    (folder / TABLE).write_text(json.dumps(document), encoding="utf-8")


@contextmanager
def open_weights(folder: Path) -> Iterator[TensorFiles | Relaid]:
    """The tensors of a component folder (or a file), each read when it is asked for.

    Raises UserError as `weight_files` and `read_header`, and when a single file has changed since it was looked at.
    """
    files = weight_files(folder)
    with TensorFiles(files) as source:
        if not (folder / TABLE).is_file():
            yield source
            return
        document = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        stat = files[0].stat()
        if (stat.st_size, stat.st_mtime_ns) != (document["bytes"], document["mtime_ns"]):
            raise UserError(
                "the file has changed since it was looked at",
                where=str(files[0]),
                mend="start again; it is looked at anew",
            )
        table = {
            name: Place(tuple(shape), tuple(Piece(*piece) for piece in pieces))
            for name, (shape, pieces) in document["tensors"].items()
        }
        yield Relaid(source, table)


def entries_of(tensors: Mapping[str, Tensor]) -> Mapping[str, TensorEntry]:
    """Shape and dtype of each tensor; of a mapping that reads files without reading them."""
    known: Any = getattr(tensors, "entries", None)
    if known is not None:
        found: Mapping[str, TensorEntry] = known
        return found
    return {
        name: TensorEntry(Path(), tensor.shape, tensor.dtype, tensor.numel() * tensor.element_size())
        for name, tensor in tensors.items()
    }
