"""What a form shows for a document: values, defaults with their source, every mistake beside its option, in one language."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whitetuner.config.document import key_lines, parse
from whitetuner.config.kinds import refuse_wrong_data
from whitetuner.config.landed import refuse_not_landed
from whitetuner.config.load import Loaded, validate
from whitetuner.config.schema import Config
from whitetuner.data.media import PICTURES
from whitetuner.data.video import VIDEOS
from whitetuner.errors import UserError, UserErrors
from whitetuner.families import registry
from whitetuner.family import ModelPaths
from whitetuner.gui import words
from whitetuner.gui.document import NAME, inner_value, number_text, shown, without_rows
from whitetuner.gui.fields import FIXED, FormField, form_fields
from whitetuner.gui.pickers import Roots
from whitetuner.gui.told import each, parts
from whitetuner.gui.training_tabs import Tab
from whitetuner.hub_names import looks_like_hub_name

#: Entries of a folder that are counted for the word beside a data path.
_COUNTED = 20_000
#: The embedded model is one of this family.
_NANO_FAMILY = "flux2-klein"
#: Parts that a model cannot do without, where its family has them.
_WEIGHTS = ("transformer", "vae", "text_encoder")
_PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder", "tokenizer")


def fresh(tab: Tab) -> str:
    """The document of a form on which nothing was said yet."""
    task = "" if tab.tasks[0] == "t2i" else f'task = "{tab.tasks[0]}"\n'
    return f'[model]\nfamily = "{tab.family}"\n{task}'


def loaded(text: str, tab: Tab | None = None, roots: Roots | None = None) -> Loaded:
    """The config of a form's document. Raises UserError(s): the schema's, what has not landed, another family's config,
    paths outside of the roots.
    """
    values = parse(text, NAME)
    lines = {key: f"{NAME} line {line}" for key, line in key_lines(text).items()}
    found = validate(values, lines)
    refuse_not_landed(found.config)
    refuse_wrong_data(found.config)
    if tab is not None and (
        found.config.model.family != tab.family or found.config.model.task not in tab.tasks
    ):
        raise UserError(
            "this is a config for {family}, {task}",
            where="model.family",
            mend="open it with Import, which finds its tab",
            family=found.config.model.family,
            task=found.config.model.task,
        )
    if roots is not None and roots.folders is not None:
        for _, _, path in _paths(fields_of(tab, text), values, found.config):
            roots.path(path)
    return found


def to_train(text: str, tab: Tab, roots: Roots) -> Loaded:
    """As `loaded`, for a run that is about to begin: nothing it needs is missing. Raises UserError(s)."""
    found = loaded(text, tab, roots)
    lacking = needed(found.config)
    if lacking:
        raise UserErrors(
            [UserError("{key} is not given", where=key, mend="fill it in", key=key) for key in lacking]
        )
    return found


def needed(config: Config) -> list[str]:
    """Keys of what a run of this config still lacks: a model, something to learn from."""
    spec = registry.spec(config.model.family)
    parts_given = {part for part in _PARTS if getattr(config.model, part) is not None}
    found = (
        []
        if config.model.path is not None or set(_WEIGHTS) & set(spec.components) <= parts_given
        else ["model.path"]
    )
    task = config.model.task
    source = {"edit": "data.target", "i2v": "data.videos", "t2v": "data.videos"}.get(task, "data.images")
    if config.data.source is None and not config.data.sets:
        found.append(source)
    if task == "edit" and not config.data.conditions and not any(one.conditions for one in config.data.sets):
        found.append("data.conditions")
    return found


def fields_of(tab: Tab | None, text: str = "") -> tuple[FormField, ...]:
    """The fields of a tab, for the task that the document chooses."""
    if tab is None:
        name = next(iter(registry.FAMILIES))
        return form_fields(registry.spec(name), registry.spec(name).tasks[0])
    return form_fields(registry.spec(tab.family), task_of(tab, text))


def task_of(tab: Tab, text: str) -> str:
    """The task that the document says, where the tab has it."""
    try:
        said = inner_value(parse(text, NAME), "model.task") if text else None
    except UserError:
        said = None
    return said if said in tab.tasks else tab.tasks[0]


def spec_json(tab: Tab, language: str, text: str = "") -> dict[str, Any]:
    """Everything that the page needs to draw the form, for one task of the tab."""
    fields = fields_of(tab, text)
    have = {field.section for field in fields}
    order = [one for name in Config.model_fields for one in (name, f"{name}.options")]
    names = [name for name in order if name in have]
    return {
        "tab": tab.key,
        "family": tab.family,
        "nano": tab.family == _NANO_FAMILY and task_of(tab, text) == "t2i",
        "title": tab.title(language),
        "films": bool(registry.spec(tab.family).frames),
        "tasks": [[task, words.choice("model.task", task, language)] for task in tab.tasks],
        "sections": [[name, words.section(name, language)] for name in names],
        "fields": [_field_json(field, tab.family, language) for field in fields if field.key not in FIXED],
        "words": words.texts("form", language),
        "language": language,
    }


def _field_json(field: FormField, family: str, language: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "key": field.key,
        "kind": field.kind,
        "tier": field.tier,
        "section": field.section,
        "label": words.label(field.key, language, family),
        "help": words.help_text(field.key, language, family),
    }
    if field.choices:
        found["choices"] = [
            [number_text(one), words.choice(field.key, one, language)] for one in field.choices
        ]
    if field.rows:
        found["rows"] = [_field_json(one, family, language) for one in field.rows]
    else:
        found["default"] = "" if field.unset or field.default == "" else shown(field, field.default)
    if field.wants:
        found["wants"] = field.wants
    if field.later is not None:
        found["later"] = [number_text(one) for one in field.later]
    return found


def state(tab: Tab, text: str, language: str, roots: Roots) -> dict[str, Any]:
    """What the form shows for the document; never raises for what the user wrote.

    Keys: text, task, values {key with row numbers: what its control holds}, rows {key: count}, defaults, errors and warnings
    {key: [[what, mend]]} ("" for what belongs to no option), notes {key: text}, needed [key], broken (the text is no TOML), ok.
    """
    found: dict[str, Any] = {
        "text": text,
        "task": task_of(tab, text),
        "values": {},
        "rows": {},
        "defaults": {},
    }
    errors: dict[str, list[list[str]]] = {}
    warnings: dict[str, list[list[str]]] = {}
    found.update(errors=errors, warnings=warnings, notes={}, needed=[], broken=False, ok=False)
    fields = fields_of(tab, text)
    try:
        values = parse(text, NAME)
    except UserError as error:
        found["broken"] = True
        what, mend = parts(error, language)
        errors.setdefault("", []).append([f"{error.where}: {what}", mend])
        return found
    for field in fields:
        _held(field, field.key, values, found)
    config = None
    try:
        good = loaded(text, tab)
        config = good.config
        found["defaults"] = _defaults(fields, good)
    except UserError as error:
        _place(error, fields, errors, language)
    for field, key, path in _paths(fields, values, config):
        problem = _missing(field, path, roots)
        if problem is not None:
            errors.setdefault(key, []).append(list(parts(problem, language)))
        elif field.key.startswith("data.") and field.wants == "folder" and field.key != "data.cache_dir":
            note = _count(field, Path(path).expanduser(), language)
            found["notes"][key] = " + ".join(filter(None, (found["notes"].get(key), note)))
    if config is not None and not errors:
        for level, problem in _of_model(config):
            _place(problem, fields, errors if level == "error" else warnings, language, "model.path")
    if config is not None:
        found["needed"] = needed(config)
    found["ok"] = not errors and not found["needed"]
    return found


def _held(field: FormField, key: str, values: Mapping[str, Any], found: dict[str, Any]) -> None:
    value = inner_value(values, key)
    if field.kind == "rows":
        rows = value if isinstance(value, list) else []
        found["rows"][key] = len(rows)
        for number in range(len(rows)):
            for one in field.rows:
                _held(one, f"{key}[{number}].{one.key.rpartition('.')[2]}", values, found)
    elif value is not None:
        is_odd = field.kind == "table" and not isinstance(value, Mapping)
        found["values"][key] = str(value) if is_odd else shown(field, value)


def _defaults(fields: Sequence[FormField], good: Loaded) -> dict[str, list[str]]:
    """{key: [text, source]} of what nothing was said about, where it is not what the form says anyway."""
    document = good.config.model_dump()
    found = {}
    for field in fields:
        if field.kind == "rows" or field.key.startswith("model.options."):
            continue
        value = inner_value(document, field.key)
        origin = good.origins.get(field.key, "default")
        if not origin.startswith(NAME) and value is not None and value != field.default:
            found[field.key] = [str(shown(field, value)), origin.removeprefix("family default ").strip("()")]
    return found


def _place(
    error: UserError,
    fields: Sequence[FormField],
    into: dict[str, list[list[str]]],
    language: str,
    otherwise: str = "",
) -> None:
    known = {field.key for field in fields} | {one.key for field in fields for one in field.rows}
    sections = {field.section for field in fields}
    for one in each(error):
        key = one.where.partition(" (")[0].strip("[]")
        while key and without_rows(key) not in known and key not in sections:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        what, mend = parts(one, language)
        about = words.help_text(key, language) if key else ""
        repeats = bool(about) and mend.endswith(about)  # it stands right above
        into.setdefault(key or otherwise, []).append([what, "" if repeats else mend])


def _paths(
    fields: Sequence[FormField], values: Mapping[str, Any], config: Config | None
) -> list[tuple[FormField, str, str]]:
    """(field, key, path) of every path that is said, and of the output folder."""
    found: list[tuple[FormField, str, str]] = []
    for field in fields:
        if field.kind == "rows":
            rows = inner_value(values, field.key)
            for number in range(len(rows) if isinstance(rows, list) else 0):
                for one in field.rows:
                    found += _of_path(one, f"{field.key}[{number}].{one.key.rpartition('.')[2]}", values)
        else:
            found += _of_path(field, field.key, values)
    if config is not None and not any(key == "run.output_dir" for _, key, _ in found):
        field = next(one for one in fields if one.key == "run.output_dir")
        found.append((field, field.key, config.run.output_dir))
    return found


def _of_path(field: FormField, key: str, values: Mapping[str, Any]) -> list[tuple[FormField, str, str]]:
    if not field.wants:
        return []
    value = inner_value(values, key)
    given = value if isinstance(value, list) else [value]
    return [
        (field, key, one)
        for one in given
        if isinstance(one, str)
        and one
        and not (one.startswith("builtin:") or (key == "run.resume" and one in ("latest", "best")))
    ]


def _missing(field: FormField, path: str, roots: Roots) -> UserError | None:
    """What is wrong with a path as a path: outside of the roots, or not there."""
    try:
        real = roots.path(path)
    except UserError as error:
        return error
    if field.key in ("run.output_dir", "data.cache_dir"):
        return None
    if field.wants == "folder" and not real.is_dir():
        return UserError("there is no folder {path}", mend="choose another", path=path)
    hub = field.key == "model.path" and looks_like_hub_name(path)
    if not real.exists() and not hub:
        return UserError("there is no file or folder {path}", mend="choose another", path=path)
    return None


def _count(field: FormField, folder: Path, language: str) -> str:
    """How many pictures a folder holds, and how many have a text of their name beside them; "" where it cannot be read."""
    texts, pictures = set(), []
    endings = VIDEOS if field.key.endswith("videos") else PICTURES
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number >= _COUNTED:
                    break
                name = Path(entry.name)
                if name.suffix.lower() in endings:
                    pictures.append(name.stem)
                elif name.suffix.lower() == ".txt":
                    texts.add(name.stem)
    except OSError:
        return ""
    both = sum(stem in texts for stem in pictures)
    kind = field.key.rpartition(".")[2]
    word = {"conditions": "counted_pictures", "videos": "counted_videos"}.get(kind, "counted")
    return words.texts("form", language)[word].format(pictures=len(pictures), captions=both)


def _of_model(config: Config) -> list[tuple[str, UserError]]:
    """What the model's folder lacks, and the family's advice; reads names and config files only."""
    spec = registry.spec(config.model.family)
    if config.model.path is None or config.model.path.startswith("builtin:"):
        return []
    folder = Path(config.model.path).expanduser()
    if not folder.is_dir():
        return []
    given = {part: getattr(config.model, part) for part in _PARTS}
    paths = ModelPaths(
        folder, {part: Path(one).expanduser() for part, one in given.items() if one is not None}
    )
    options = config.model_options()
    try:
        for name in spec.components_of(options, paths):
            paths.component(name)
        return [("warning", one) for one in spec.advice(options, paths)]
    except UserError as error:
        return [("error", error)]
