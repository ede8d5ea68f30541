"""What lies beside the final files: how many of their names the programs know they are for, and a workflow for ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whitetuner.adapters.names import parse, targets
from whitetuner.checkpoint.original import known_layout
from whitetuner.config.schema import Config
from whitetuner.families.comfy_workflows import Wanted, workflow
from whitetuner.family import Family, KeyMap
from whitetuner.memory.weights import read_header
from whitetuner.records import Size
from whitetuner.runs.files import write_atomically
from whitetuner.runs.folder import RunFolder
from whitetuner.single_files import table_source


def beside_final(
    config: Config, family: Family, folder: RunFolder, size: Size, files: Sequence[Path]
) -> list[Path]:
    """Notes in run.json which names of the final files are known to whom; writes final/NAME_comfyui.json. -> what was written.

    size: of the first picture that was trained on. Raises UserError when a file cannot be read again or written.
    """
    names = {}
    for file in files:
        if file.is_file():
            names[file.relative_to(folder.path).as_posix()] = known_to(file, family.keys)
    folder.update(names=names)
    made = workflow(_wanted(config, family, size))
    if made is None:
        return []
    target = folder.final / f"{config.run.name}_comfyui.json"
    write_atomically(target, json.dumps(made, indent=1, ensure_ascii=False))
    return [target]


def known_to(file: Path, keymap: KeyMap) -> dict[str, Any]:
    """{"program", "known", "total"}: tensors of a final file whose names lead to a layer (a tensor) of the model, by the key map
    alone; program "": ComfyUI has no such model, and the file is for White Tuner and LyCORIS."""
    entries = read_header(file)
    parsed = {name: parse(name) for name in entries}
    if any(parsed.values()):
        diffusers = all(name.startswith("transformer.") for name in entries)
        program = "diffusers" if diffusers else "ComfyUI"
        sizes = {one.prefix: _rows(one.prefix, entries) for one in parsed.values() if one}
        good = {prefix for prefix, rows in sizes.items() if targets(prefix, rows, keymap)}
        known = sum(1 for one in parsed.values() if one and one.prefix in good)
    else:
        found = known_layout({name: tuple(entry.shape) for name, entry in entries.items()}, keymap)
        program = "ComfyUI" if found is None or found[0] == "original" else "diffusers"
        read = {piece.source for place in found[1].values() for piece in place.pieces} if found else set()
        known = sum(1 for name, entry in entries.items() if name in read or 0 in entry.shape)
    if program == "ComfyUI" and not getattr(keymap, "in_comfyui", True):
        program = ""
    return {"program": program, "known": known, "total": len(entries)}


def _rows(prefix: str, entries: Mapping[str, Any]) -> int:
    """Rows of the layer's weight, as far as one tensor tells: enough for a name that stands for one layer."""
    up = entries.get(f"{prefix}.lora_up.weight") or entries.get(f"{prefix}.lora_B.weight")
    return int(up.shape[0]) if up else 6


def _wanted(config: Config, family: Family, size: Size) -> Wanted:
    spec, options, paths = family.spec, family.options, family.paths
    prompt = config.preview.prompts[0] if config.preview.prompts else None
    steps, cfg = spec.sampling(options, paths)
    if prompt is not None:
        steps, cfg = prompt.steps or steps, cfg if prompt.cfg is None else prompt.cfg
        if prompt.size:
            size = Size(prompt.size[0], prompt.size[1], prompt.frames or size.frames)
    variant = spec.variant_of(options, paths) or next(iter(spec.variants))
    parts = spec.parts(options)
    shift = config.noise.shift
    tokens = spec.tokens(size, family.stride())
    return Wanted(
        family=spec.name,
        variant=variant,
        task=config.model.task,
        trained={part.name: part.file(config.run.name) for part in parts},
        adapter=config.method.kind != "full",
        prompt=prompt.text if prompt else config.data.trigger or "",
        negative=prompt.negative if prompt else "",
        size=size,
        steps=steps,
        cfg=float(cfg),
        seed=prompt.seed if prompt else 0,
        shift=float(shift)
        if shift != "auto"
        else round(spec.auto_shift(tokens), 2)
        if spec.auto_shift
        else 3.0,
        fps=spec.fps_of(options, paths),
        references=len(prompt.images) if prompt else int(config.model.task != "t2i"),
        boundary=float(getattr(options, "boundary", None) or 0.9),
        files=_own_files(family),
    )


def _own_files(family: Family) -> dict[str, str]:
    """Names of the single files that the run was given: its user has them in ComfyUI's folders."""
    found = {}
    for part, folder in family.paths.single.items():
        source = table_source(folder)
        if source is not None:
            found[part] = source.name
    return found
