"""The words of the command line about files: export, merge, extract, resize. `inspect` only looks (checkpoint/inspect.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from whitetuner.adapters.deltas import delta_from
from whitetuner.adapters.files import load_adapter, read_safetensors
from whitetuner.adapters.names import Naming
from whitetuner.adapters.shapes import AdapterSettings
from whitetuner.adapters.state import by_module, file_suffix, infer_settings
from whitetuner.checkpoint.export import Exported, export_adapter
from whitetuner.checkpoint.factor import factors_of
from whitetuner.checkpoint.inspect import inspect_file
from whitetuner.checkpoint.plain import deltas_of
from whitetuner.config.load import load_config
from whitetuner.denoisers import Denoiser, open_denoiser, plain, write_denoiser
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.families.part_files import PART_FILES
from whitetuner.learned import learned_files, no_run
from whitetuner.memory.weights import read_header
from whitetuner.models import model_paths
from whitetuner.runs.folder import RunFolder

Say = Callable[[str], None]


def export(
    source: Path,
    target: Path,
    naming: Naming,
    family: str | None,
    dtype: str | None,
    *,
    checkpoint: int | str | None = None,
) -> str:
    """An adapter file or a whole denoiser in the names of another program; -> what was done.

    source: file or folder, or a run's folder: then what it has learned, in the end or (checkpoint) at "best", "latest", a step
    """
    run = RunFolder(source)
    if run.is_run():
        with TemporaryDirectory() as beside:
            learned = _learned(run, checkpoint, Path(beside))
            return export(learned, target, naming, family, dtype)
    if checkpoint is not None:
        raise no_run(str(source))
    _apart(target, source)
    found = {} if source.is_dir() else inspect_file(source, registry.keymaps())
    if found.get("what") == "adapter":
        family = family or family_of(source, found)
        settings, tensors = load_adapter(source, registry.keys(family))
        words = kept_words(found["metadata"])
        done = export_adapter(
            tensors, settings, registry.keys(family), path=target, naming=naming, metadata=words
        )
        return f"wrote {target} ({naming} names, {done.modules} layers, {done.tensors} tensors)"
    if naming == "lycoris":
        raise UserError(
            "lycoris is a naming of adapters; this is a whole model",
            where="--to",
            mend="use --to comfyui or --to diffusers, or `whitetuner extract` for an adapter",
        )
    with open_denoiser(source) as model:
        _no_other_layout(model.family, naming)
        layout = "diffusers" if naming == "diffusers" else "original"
        done_model = write_denoiser(target, model, plain(model, dtype), layout, _words(model, "exported"))
    return (
        f"wrote {done_model.path} ({naming} layout, {done_model.known} of {done_model.tensors} names known)"
    )


def _learned(run: RunFolder, checkpoint: int | str | None, beside: Path) -> Path:
    config = load_config(run.config_file).config
    options = config.model_options()
    family = registry.load(config.model.family, options, model_paths(config))
    parts = registry.spec(config.model.family).parts(family.options)
    if len(parts) > 1:
        raise UserError(
            "one file is asked for, and this run has one for each expert",
            where=str(run.path),
            mend="export them one by one: {files}",
            files=", ".join(f"{config.method.kind}/{part.file(config.method.kind)}" for part in parts),
        )
    return learned_files(run, parts, config.method.kind, checkpoint, beside)[parts[0].name]


def merge(base: Path, adapter: Path, target: Path, strength: float, dtype: str | None, part: str) -> str:
    """The adapter added to a model's weights in float32, rounded once; the layout is the base's. -> what was done."""
    _apart(target, base, adapter)
    if not math.isfinite(strength):
        raise UserError("{value} does not do here", where="--strength", mend="give a number", value=strength)
    with open_denoiser(base, part) as model:
        _, state = load_adapter(adapter, registry.keys(model.family))
        additions = deltas_of(state, model.state, str(adapter), strength)
        layout = (
            model.layout if model.single else "original" if target.suffix == ".safetensors" else "diffusers"
        )
        words = {**_words(model, "merged"), "whitetuner.merged": f"{adapter.name} x {strength:g}"}
        done = write_denoiser(target, model, plain(model, dtype, additions), layout, words)
    return f"wrote {done.path} ({len(additions)} of {done.tensors} tensors changed, each rounded once)"


def extract(
    tuned: Path, base: Path, target: Path, settings: AdapterSettings, naming: Naming, say: Say
) -> tuple[Exported, float]:
    """(the adapter whose sum with `base` is nearest to `tuned`, its relative error over everything that differs).

    Linear layers among the family's usual targets. What differs elsewhere (norms, biases) is part of the error, and said.
    """
    _apart(target, tuned, base)
    with open_denoiser(tuned) as one, open_denoiser(base) as other:
        if one.family != other.family or set(one.state) != set(other.state):
            raise UserError(
                "the two models are not of one family and size ({first}, {second})",
                where=str(base),
                mend="give the model that the first one was trained from",
                first=one.family,
                second=other.family,
            )
        patterns = registry.spec(one.family).adapter_targets
        state: dict[str, Tensor] = {}
        whole = missed = 0.0
        worst, left = (0.0, "-"), []
        for name, delta in _differences(one, other):
            size = float(delta.double().square().sum())
            whole += size
            path = name.removesuffix(".weight")
            if delta.ndim != 2 or not any(fnmatchcase(path, pattern) for pattern in patterns):
                missed += size
                left.append(name)
                continue
            tensors = factors_of(delta, settings)
            gone = _left(delta, tensors)
            missed += gone
            worst = max(worst, (math.sqrt(gone / size), path))
            state.update({f"{path}.{file_suffix(key)}": tensor for key, tensor in tensors.items()})
            say(f"{path}: {math.sqrt(gone / size):.1%} off")
        if not state:
            raise UserError(
                "the two models differ in no layer that an adapter changes",
                where=str(tuned),
                mend="give the trained model first and its base second",
            )
        error = math.sqrt(missed / whole)
        words = {"whitetuner.extracted": f"relative error {error:.4f}"}
        done = export_adapter(
            state,
            replace(settings, alpha=None),
            registry.keys(one.family),
            path=target,
            naming=naming,
            metadata=words,
        )
    if left:
        say(f"not in the adapter: {len(left)} tensors that differ too (such as {left[0]})")
    say(f"the furthest layer is {worst[0]:.1%} off ({worst[1]})")
    return done, error


def resize(
    source: Path, target: Path, wanted: Mapping[str, int | str], family: str | None
) -> tuple[Exported, float]:
    """(the adapter in another rank, factor or kind, its relative error). wanted: fields of AdapterSettings that change."""
    _apart(target, source)
    family = family or family_of(source, inspect_file(source, registry.keymaps()))
    keymap = registry.keys(family)
    found, state = load_adapter(source, keymap)
    settings = replace(found, alpha=None, full_matrix=False, decompose_both=False, **wanted)  # type: ignore[arg-type]
    made: dict[str, Tensor] = {}
    whole = missed = 0.0
    for path, module in by_module(state).items():
        delta = delta_from(module.tensors, module.scale).weight().detach()
        tensors = factors_of(delta, settings)
        whole += float(delta.double().square().sum())
        missed += _left(delta, tensors)
        made.update({f"{path}.{file_suffix(name)}": tensor for name, tensor in tensors.items()})
    error = math.sqrt(missed / whole) if whole else 0.0
    words = kept_words(read_safetensors(source)[1]) | {"whitetuner.resized": f"relative error {error:.4f}"}
    done = export_adapter(
        made, infer_settings(by_module(made)), keymap, path=target, naming=_naming_of(source), metadata=words
    )
    return done, error


def kept_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file says of its training; not what it says of its own tensors, which is written anew."""
    own = ("ss_network_", "whitetuner.", "format", "lora_adapter_metadata", "modelspec.sai_model_spec")
    return {name: text for name, text in metadata.items() if not name.startswith(own)}


def told_of(file: Path) -> dict[str, Any]:
    """`inspect_file`, and VAEs and encoders by name: which part of which families a file is."""
    found = inspect_file(file, registry.keymaps())
    if found["what"] == "unknown":
        shapes = {name: tuple(entry.shape) for name, entry in read_header(file).items()}
        kinds = [kind for kind in PART_FILES if kind.known_by(shapes)]
        if kinds:
            families = list(dict.fromkeys(name for kind in kinds for name in kind.families))
            found |= {"what": kinds[0].part, "is": kinds[0].title, "families": families}
    return found


def _left(delta: Tensor, tensors: Mapping[str, Tensor]) -> float:
    """Squared size of what the factors do not hold."""
    return float((delta - delta_from(tensors, 1.0).weight().detach()).double().square().sum())


def family_of(source: Path, found: Mapping[str, object]) -> str:
    """Of an adapter file, as `inspect_file` found it. Raises UserError when it does not tell, or is none."""
    if found.get("what") != "adapter" or "cannot_be_read" in found:
        load_adapter(source, registry.keys(next(iter(registry.FAMILIES))))  # says what is wrong with the file
    if not isinstance(found.get("family"), str):
        raise UserError(
            "the file does not tell which model it is for",
            where=str(source),
            mend="add --family; known: {known}",
            known=", ".join(registry.FAMILIES),
        )
    return str(found["family"])


def _differences(one: Denoiser, other: Denoiser) -> Iterator[tuple[str, Tensor]]:
    """(name, difference in float32) of every tensor that differs."""
    first, second = plain(one, "fp32"), plain(other, "fp32")
    for name in first:
        if first.entries[name].shape != second.entries[name].shape:
            raise UserError(
                "{name} has another size in the two models",
                where=str(other.path),
                mend="give the model that the first one was trained from",
                name=name,
            )
        delta = first[name] - second[name]
        if bool(delta.any()):
            yield name, delta


def _naming_of(source: Path) -> Naming:
    """So that the new file loads where the old one did."""
    names = inspect_file(source, registry.keymaps()).get("naming", "")
    return "diffusers" if names in ("diffusers", "PEFT") else "comfyui"


def _no_other_layout(family: str, naming: Naming) -> None:
    if naming == "comfyui" and not getattr(registry.keys(family), "in_comfyui", True):
        raise UserError(
            "ComfyUI does not know {title}, so there is no layout of it for ComfyUI",
            where="--to",
            mend="use --to diffusers",
            title=registry.spec(family).title,
        )


def _words(model: Denoiser, did: str) -> dict[str, str]:
    return {"whitetuner.from": f"{did} from {model.path.name}", "whitetuner.family": model.family}


def _apart(target: Path, *sources: Path) -> None:
    for source in sources:
        if not source.exists():
            raise UserError("there is no such file", where=str(source), mend="look at the path")
        if target.exists() and target.samefile(source):
            raise UserError("OUT is the same file as IN", where=str(target), mend="give another name for OUT")
