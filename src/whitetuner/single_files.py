"""Parts of a model given as single files, as ComfyUI users have them, become component folders that everything else reads.

Such a folder (in the user's state folder, a few hundred kilobytes) holds a config.json told from the shapes and a table of
which rows of the file each tensor is (whitetuner.memory.relaid): the weights stay where they are and are never copied. What a
file is, its tensors' names and shapes say; file names mean nothing. What no file of weights holds (scheduler, picture
processor, the tokenizers of Qwen) is written from the releases' settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.families.part_files import PART_FILES, PartFile, Shapes
from whitetuner.families.part_settings import FROM, SETTINGS
from whitetuner.family import FamilySpec, KeyMap
from whitetuner.hub_names import HubName
from whitetuner.runs.state import state_folder
from whitetuner.version import __version__

#: Changes when the same file would become another folder.
_FORMAT = 1
DENOISERS = ("transformer", "transformer_2")
_PREFIX = "model.diffusion_model."


def component_of(spec: FamilySpec, part: str, file: Path) -> Path:
    """The component folder that stands for a single file; made once, found again while the file is unchanged.

    Raises UserError: no whole safetensors file, a pickle, a file of another family or another part, a size that is not known.
    """
    if part == "tokenizer":
        raise UserError(
            "a tokenizer is a folder, not one file",
            where="model.tokenizer",
            mend="give the folder with tokenizer.json and tokenizer_config.json",
        )
    # torch is imported only where a single file was given
    from whitetuner.adapters.files import check_file

    check_file(file)
    stat = file.stat()
    key = f"{_FORMAT}|{__version__}|{spec.name}|{part}|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    name = f"{part}-{hashlib.blake2b(key.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()}"
    return _made(name, lambda folder: _write_part(spec, part, file, folder))


def settings_of(spec: FamilySpec, part: str) -> Path | None:
    """The component folder of a part that has no weights, where we know what it says; None: it has to be given."""
    files = SETTINGS.get(spec.name, {}).get(part)
    qwen = {"qwen-image": "qwen2.5", "flux2-klein": "qwen3", "zimage": "qwen3", "zimage-v2": "qwen3"}
    if files is not None:
        return _made(f"{spec.name}-{part}-{_FORMAT}-{__version__}", lambda folder: _write_json(folder, files))
    if part == "tokenizer" and spec.name in qwen:
        from whitetuner.families.qwen_words.folder import write_tokenizer

        release: Any = qwen[spec.name]
        return _made(
            f"tokenizer-{release}-{_FORMAT}-{__version__}", lambda folder: write_tokenizer(folder, release)
        )
    return None


def carried_tokenizer(spec: FamilySpec, encoder: Path) -> Path | None:
    """The tokenizer's folder, made of what the text encoder's single file carries; None: it carries none, or is a folder.

    encoder: component folder that stands for the file. Raises UserError when what it carries cannot be read.
    """
    file = table_source(encoder)
    if file is None:
        return None
    from whitetuner.families.sentence_pieces import write_tokenizer
    from whitetuner.memory.weights import TensorFiles, read_header

    entries = read_header(file)
    kind = _part_file({name: tuple(entry.shape) for name, entry in entries.items()}, spec.name)
    if kind is None or kind.pieces not in entries:
        return None
    rows = json.loads((encoder / "config.json").read_text(encoding="utf-8"))["vocab_size"]

    def write(folder: Path) -> None:
        with TensorFiles([file]) as source:
            write_tokenizer(folder, source[kind.pieces].numpy().tobytes(), rows, str(file))

    return _made(f"tokenizer-{encoder.name}", write)


@dataclass(frozen=True)
class Fetched:
    """A hub's model that is here, whole. parts: components that were asked for, those among them that it has not."""

    folder: Path
    parts: frozenset[str]


def fetched_note(name: HubName) -> Path:
    """Where it is noted that a hub's model was fetched, whole (whitetuner.hub)."""
    return state_folder() / "hub" / f"{name.stem}.json"


def fetched(name: HubName) -> Fetched | None:
    """A model that was fetched from a hub; None when it was not, or is not whole any more."""
    note = fetched_note(name)
    if not note.is_file():
        return None
    document = json.loads(note.read_text(encoding="utf-8"))
    folder = Path(document["folder"])
    whole = all((folder / file).is_file() for file in document["files"])
    return Fetched(folder, frozenset(document.get("parts", ()))) if whole else None


def table_source(component: Path) -> Path | None:
    """The single file that a component folder stands for; None for a folder with weights of its own."""
    table = component / "weights.json"
    return Path(json.loads(table.read_text(encoding="utf-8"))["file"]) if table.is_file() else None


def whence(spec: FamilySpec, part: str) -> str:
    """Where a missing part is to be had: the single file that ComfyUI users have, and the released folder."""
    folder = f"the folder {part} of {spec.components.get(part, spec.title)}"
    single = FROM.get(spec.name, {}).get(part)
    return folder if single is None else f"{single}, or {folder}"


def _made(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name, written beside its place and renamed: ranks and pages may ask at once."""
    folder = state_folder() / "parts" / name
    if folder.is_dir():
        return folder
    beside = folder.with_name(f".{name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write(beside)
        try:
            beside.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _write_json(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, document in files.items():
        (folder / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _write_part(spec: FamilySpec, part: str, file: Path, folder: Path) -> None:
    from whitetuner.memory.relaid import write_table
    from whitetuner.memory.weights import is_fp8_extra, read_header

    entries = read_header(file)
    _refuse_packed(file, entries)
    shapes = {name: tuple(entry.shape) for name, entry in entries.items() if not is_fp8_extra(name)}
    if part in DENOISERS:
        config, table = _denoiser(spec, file, shapes)
    else:
        config, table = _encoder(spec, part, file, shapes)
    # Z-Image's releases are alike but for the name that they come by (families/z_image_facts.py).
    _write_json(folder, {"config.json": {**config, "_name_or_path": file.stem}})
    write_table(folder, file, table)


def _denoiser(spec: FamilySpec, file: Path, shapes: Shapes) -> tuple[dict[str, Any], Any]:
    from whitetuner.checkpoint.original import known_layout

    names = [spec.name, *(one for one in registry.FAMILIES if one != spec.name)]
    for name in names:
        keymap = registry.keys(name)
        found = known_layout(shapes, keymap)
        if found is None:
            continue
        table = found[1]
        allowed = (spec.transformer_class, *spec.converts)
        if name != spec.name and registry.spec(name).transformer_class not in allowed:
            raise UserError(
                "this is a denoiser of {found}, not of {wanted}",
                where=str(file),
                mend="set model.family to the file's family, or give {whence}",
                found=registry.spec(name).title,
                wanted=spec.title,
                whence=whence(spec, "transformer"),
            )
        made = {key: place.shape for key, place in table.items()}
        return told_config(file, keymap, made, list(shapes)), table
    other = _part_file(shapes, None)
    raise _unknown(spec, "transformer", file, shapes, other)


def told_config(file: Path, keymap: KeyMap, shapes: Shapes, names: list[str]) -> dict[str, Any]:
    """config.json of a denoiser, from its shapes by diffusers name. names: in the file, marks too.

    Raises UserError for a family whose shapes do not tell it, and for a file without the tensors that do.
    """
    infer = getattr(keymap, "config", None)
    if infer is None:
        raise UserError(
            "a single file of this family does not tell its settings",
            where=str(file),
            mend="give the folder in diffusers layout (config.json beside the weights)",
        )
    return _held_against(file, infer, shapes, names)


def _encoder(spec: FamilySpec, part: str, file: Path, shapes: Shapes) -> tuple[dict[str, Any], Any]:
    from whitetuner.memory.relaid import trace

    kind = _part_file(shapes, spec.name)
    if kind is None or kind.part != part or spec.name not in kind.families:
        raise _unknown(spec, part, file, shapes, kind)
    kept = {name: shape for name, shape in shapes.items() if not re.match(kind.unused, name)}
    config = _held_against(file, lambda given, _: kind.config(given), kept, [])
    table = trace(kept, lambda rows: kind.convert(rows, config))
    for name, place in table.items():
        if re.match(kind.flat, name) and place.shape[2:] == (1, 1):
            table[name] = replace(place, shape=place.shape[:2])
    return config, table


def _held_against(
    file: Path, infer: Callable[[Shapes, list[str]], dict[str, Any]], shapes: Shapes, names: list[str]
) -> dict[str, Any]:
    try:
        return infer(shapes, names)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            "the file lacks tensors that tell its size ({name})",
            where=str(file),
            mend="download it again; if it is whole, it is a kind that is not known here: give a diffusers folder",
            name=error,
        ) from error


def _part_file(shapes: Shapes, family: str | None) -> PartFile | None:
    """What the file is; of kinds that look alike the family's own."""
    found = [kind for kind in PART_FILES if kind.known_by(shapes)]
    return next((kind for kind in found if family in kind.families), found[0] if found else None)


def _unknown(spec: FamilySpec, part: str, file: Path, shapes: Shapes, kind: PartFile | None) -> UserError:
    whole = sum(name.startswith(_PREFIX) for name in shapes)
    if whole and whole < len(shapes):
        return UserError(
            "this is a checkpoint of several parts in one file, which is not read here",
            where=str(file),
            mend="give the parts one by one: {whence}",
            whence=whence(spec, part),
        )
    if kind is not None:
        return UserError(
            "this is {found}, not {part} of {title}",
            where=f"model.{part} ({file})",
            mend="give {whence}",
            found=kind.title,
            part=part,
            title=spec.title,
            whence=whence(spec, part),
        )
    denoiser = next((name for name in registry.FAMILIES if _is_denoiser(shapes, name)), None)
    if denoiser is not None:
        return UserError(
            "this is a denoiser of {found}, not {part} of {title}",
            where=f"model.{part} ({file})",
            mend="it belongs at model.transformer; here give {whence}",
            found=registry.spec(denoiser).title,
            part=part,
            title=spec.title,
            whence=whence(spec, part),
        )
    return UserError(
        "this is no {part} of {title} (its tensors are named like {name})",
        where=f"model.{part} ({file})",
        mend="give {whence}; `whitetuner inspect` tells what a file is",
        part=part,
        title=spec.title,
        name=next(iter(shapes), "-"),
        whence=whence(spec, part),
    )


def _is_denoiser(shapes: Shapes, family: str) -> bool:
    from whitetuner.checkpoint.original import known_layout

    return known_layout(shapes, registry.keys(family)) is not None


def _refuse_packed(file: Path, entries: Mapping[str, Any]) -> None:
    """Raises UserError for weights in number formats of other programs (int8, nvfp4, GGUF's): two of them in one byte."""
    packed = [
        name
        for name, entry in entries.items()
        if name.endswith(".weight") and len(entry.shape) > 1 and not entry.dtype.is_floating_point
    ]
    if packed:
        raise UserError(
            "the weights are packed by another program ({name} is {dtype})",
            where=str(file),
            mend="give the bf16, fp16 or fp8 file of this model; it is quantised while it loads (memory.base)",
            name=packed[0],
            dtype=str(entries[packed[0]].dtype).removeprefix("torch."),
        )
