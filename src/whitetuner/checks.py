"""`check`: a look at a config and all it names, or at a bare folder of pictures, before anything big is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whitetuner.config.full import refuse_wrong_full
from whitetuner.config.kinds import refuse_wrong_data
from whitetuner.config.landed import refuse_not_landed
from whitetuner.config.load import load_config
from whitetuner.config.migrate import rewrite_file
from whitetuner.config.schema import Config
from whitetuner.config.shard import refuse_wrong_shard
from whitetuner.data.captions import convert_captions
from whitetuner.data.check import CheckReport, check_sets
from whitetuner.data.check_page import write_check_html
from whitetuner.data.pairs import edit_layout
from whitetuner.data.scan import Films, SetOptions, caption_files
from whitetuner.data.tags import orders_of
from whitetuner.data.video_folders import holds_videos
from whitetuner.errors import UserError, UserErrors
from whitetuner.families import registry
from whitetuner.family import Family, FamilySpec, ModelPaths
from whitetuner.models import films_of, model_paths

#: Resolution that a bare folder is looked at with: what most models want.
FOLDER_RESOLUTION, FOLDER_STRIDE_PX = 1024, 16
#: The same for videos: the area of 832 x 480.
FILM_RESOLUTION = 640


@dataclass(frozen=True)
class Findings:
    """errors: what stops a run, besides what `data` found; advice: worth knowing; page: the report that was written."""

    data: CheckReport | None
    errors_outside: list[UserError] = field(default_factory=list)
    advice: list[UserError] = field(default_factory=list)
    page: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[object]:
        return [*self.errors_outside, *(self.data.errors if self.data else [])]

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": not self.errors,
            "errors": [str(error) for error in self.errors_outside],
            "advice": [str(one) for one in self.advice],
            "notes": self.notes,
            "data": self.data.as_json() if self.data else None,
            "report": str(self.page) if self.page else None,
        }

    def as_text(self) -> str:
        lines = [self.data.as_text()] if self.data else []
        lines += self.notes
        lines += [f"warning: {one}" for one in self.advice]
        lines += [f"error: {error}" for error in self.errors_outside]
        if self.page:
            lines.append(f"report: {self.page}")
        lines.append("ready to train" if not self.errors else f"{len(self.errors)} things to mend first")
        return "\n".join(lines)


def check_folder(folder: Path, *, deep: bool, convert: bool | str) -> Findings:
    """A bare folder, as a data set for a model of the usual size; the page goes to output/check/FOLDER/report.html.

    With sub-folders target*/ and condition*/ it is an edit set; with video files, a video set for clips of 81 frames.
    """
    edit = edit_layout(folder)
    if edit is None and holds_videos(folder):
        section = SetOptions(videos=folder, resolution=FILM_RESOLUTION)
    elif edit is None:
        section = SetOptions(images=folder, resolution=FOLDER_RESOLUTION)
    else:
        section = SetOptions(target=edit[0], conditions=edit[1], resolution=FOLDER_RESOLUTION)
    notes, errors = _convert([section], convert)
    report = check_sets([section], FOLDER_STRIDE_PX, films=Films(4), deep=deep)
    page = _page(
        report, Path("output") / "check" / (folder.resolve().name or "folder") / "report.html", errors
    )
    return Findings(report, errors, page=page, notes=notes)


def check_config(
    path: Path,
    overrides: Sequence[str],
    *,
    deep: bool,
    model: bool,
    convert: bool | str,
    migrate: bool = False,
) -> Findings:
    """A config, its model folder (unless model is False) and its pictures. Raises UserError when the config cannot be read.

    migrate: rewrite the file first, where it speaks in an earlier version's words
    """
    told = rewrite_file(path) if migrate else []
    loaded = load_config(path, overrides)
    config = loaded.config
    told += [f"{path.name}: {one} (`check --migrate` rewrites the file)" for one in loaded.notes]
    errors: list[UserError] = []
    paths: ModelPaths | None = None
    spec = registry.spec(config.model.family)
    advice: list[UserError] = []
    looks = (
        lambda: refuse_wrong_full(config),
        lambda: refuse_wrong_shard(config),
        lambda: refuse_not_landed(config),
        lambda: refuse_wrong_data(config),
    )
    for look in (*looks, *([lambda: model_paths(config)] if model else [])):
        try:
            paths = look() or paths
        except UserErrors as several:
            errors += several.errors
        except UserError as error:
            errors.append(error)
    if paths is not None:
        from whitetuner.rehearsal import rehearse  # torch and diffusers, seconds to import

        advice += spec.advice(config.model_options(), paths)
        try:
            rehearse(config, registry.load(spec.name, config.model_options(), paths))
        except UserErrors as several:
            errors += several.errors
        except UserError as error:
            errors.append(error)
    try:
        sections = config.data_sets()
    except UserError as error:
        return Findings(None, [*errors, error], advice, notes=told)
    notes, refused = _convert(sections, convert)
    notes[:0] = told
    errors += refused
    report = check_sets(
        sections,
        spec.stride_px if paths is None else spec.stride(paths),
        min_size_px=spec.min_size_px,
        most_conditions=None if paths is None else spec.references_at_most(config.model_options(), paths),
        films=films_of(config, spec, config.model_options(), paths),
        batch_size=config.data.batch_size,
        deep=deep,
        tokens=None if paths is None else _counter(paths, spec.template_tokens),
        max_tokens=getattr(config.model_options(), "max_sequence_length", 512),
    )
    errors += _batch(config, report) + _faults(spec, report)
    if paths is not None and not errors:
        notes += _cached(config, registry.load(spec.name, config.model_options(), paths), report)
    page = _page(report, Path(config.run.output_dir) / "check" / config.run.name / "report.html", errors)
    return Findings(report, errors, advice, page, notes + _enough(config, report))


def _counter(paths: ModelPaths, template: int) -> Callable[[str], int] | None:
    """Counts a caption's tokens by the model's own tokenizer; None where it has no tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        file = paths.component("tokenizer") / "tokenizer.json"
    except UserError:
        return None
    if not file.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: template + len(tokenizer.encode(text, add_special_tokens=False).ids)


def _convert(sections: Sequence[object], encoding: bool | str) -> tuple[list[str], list[UserError]]:
    """(what came out, since the encoding may have been guessed; why others stay). encoding: a name, True: guessed, False: off."""
    told: list[str] = []
    errors: list[UserError] = []
    try:
        files = list(dict.fromkeys(caption_files(sections))) if encoding else []
    except UserError:  # a folder that is not there: the check itself says so
        files = []
    for file in files:
        try:
            done = convert_captions([file], encoding if isinstance(encoding, str) else None)
        except UserError as error:
            errors.append(error)
        else:
            told += [
                f"{one.path}: {one.encoding} -> UTF-8: {one.text[:60]!r} (kept: {one.kept.name})"
                for one in done
            ]
    return told, errors


def _page(report: CheckReport, path: Path, errors: list[UserError]) -> Path | None:
    """The report that was written; that it could not be is one more finding, and no reason to hide the others."""
    try:
        return write_check_html(report, path)
    except UserError as error:
        errors.append(error)
        return None


def _batch(config: Config, report: CheckReport) -> list[UserError]:
    """The same words as the run's own, see data/order.py."""
    samples = sum(report.sets[one.set_index].repeats * report.items(one) for one in report.pictures)
    if not samples or config.data.batch_size <= samples:
        return []
    return [
        UserError(
            "batch_size = {batch} is more than the {samples} samples of a whole epoch",
            where="data.batch_size",
            mend="set data.batch_size to at most {samples}, or raise repeats of the sets",
            batch=config.data.batch_size,
            samples=samples,
        )
    ]


def _faults(spec: FamilySpec, report: CheckReport) -> list[UserError]:
    """Captions that this model cannot take, each once: a prompt for all pictures is one."""
    captions = dict.fromkeys(one.caption for one in report.pictures if one.caption)
    return [fault for fault in map(spec.caption_fault, captions) if fault is not None]


def _cached(config: Config, family: Family, report: CheckReport) -> list[str]:
    """What the cache will take of the disk."""
    from whitetuner.rehearsal import cache_bytes
    from whitetuner.resolve import choose_device, choose_dtype

    placed = [
        (
            one.size,
            (one.size._replace(frames=1),) if config.model.task == "i2v" else tuple(one.condition_sizes),
            1 if one.film is None else len(one.film.clips),
            1 + len(_shuffled(one.caption, report.sets[one.set_index].options)),
        )
        for one in report.pictures
        if one.size is not None and one.caption is not None
    ]
    if not placed:
        return []
    dtype = choose_dtype(config.memory.dtype, choose_device(config.memory.device))
    texts = [count for *_, count in placed]
    shuffled = texts if max(texts) > 1 else ()
    shapes = [(size, given) for size, given, _, _ in placed]
    each = cache_bytes(family, dtype, shapes, config.model.task, shuffled)
    whole = sum(size * clips for size, (_, _, clips, _) in zip(each, placed))
    told = [
        f"in the cache: at most {max(each) / 1e6:.3g} MB of a picture or clip, {whole / 1e6:.3g} MB in all"
    ]
    if shuffled:
        told.append(f"shuffled captions: {sum(texts)} texts are encoded for {len(texts)} captions")
    return told


def _shuffled(caption: str, options: SetOptions) -> tuple[str, ...]:
    return orders_of(caption, options.caption_shuffles, options.caption_keep)


def _enough(config: Config, report: CheckReport) -> list[str]:
    steps = config.run.steps
    if steps is None or not report.usable:
        return []
    items = sum(map(report.items, report.pictures))
    visits = steps * config.data.batch_size * config.optimizer.gradient_accumulation / items
    what = "clip" if any(one.film is not None for one in report.pictures) else "picture"
    return [f"{steps} steps visit each {what} about {visits:.0f} times"]
