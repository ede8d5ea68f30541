"""File, preset, form and --set -> one Config, with the origin of every value; all mistakes are told at once."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import ValidationError

from whitetuner.config.document import key_lines, parse, read_text, value_of
from whitetuner.config.migrate import CONFIG_FORMAT, FORMAT, KEY, Moved, today
from whitetuner.config.options import families, options_of, spec_of
from whitetuner.config.preset import preset_text, presets
from whitetuner.config.schema import Config
from whitetuner.config.told import (
    field_of,
    findings,
    known_only,
    misquoted,
    option_findings,
    section_of,
    takes_text,
    unknown_keys,
    where,
)
from whitetuner.config.write import dump_config
from whitetuner.errors import UserError, UserErrors, require_text
from whitetuner.family import FamilySpec, Setting
from whitetuner.version import __version__

__all__ = [
    "Loaded",
    "differences",
    "dump_config",
    "load_config",
    "presets",
    "setting_value",
]


@dataclass(frozen=True)
class Loaded:
    """config; origins: dotted key -> "FILE line 3" | "form" | "--set" | "preset NAME" | "family default (source)" | "default";
    path: the config file, if there was one; notes: what was said in an earlier version's words, and how it was read."""

    config: Config
    origins: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return self.config.model_dump(mode="json")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"config": self.document(), CONFIG_FORMAT: FORMAT}

    def metadata(self) -> dict[str, str]:
        """What files of this run carry about it: what was learned and how, nothing of this machine (no folders)."""
        document = self.document()
        for section in ("memory", "log", "save"):
            del document[section]
        for section, name in (
            ("run", "output_dir"),
            ("run", "resume"),
            ("data", "cache_dir"),
            ("data", "workers"),
        ):
            del document[section][name]
        return {
            "whitetuner_version": __version__,
            "whitetuner_config": json.dumps(_last_names(document), sort_keys=True),
        }


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    preset: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> Loaded:
    """The config of a file, or of a form (`base`: {dotted key: value}), preset below, --set above.

    Order: --set > form > file > preset > the family's proposals > defaults. Raises UserError(s).
    """
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    notes: list[str] = []

    def layer(given: Mapping[str, Any], from_: Mapping[str, str], where: str) -> None:
        nonlocal values
        given, moved = today(given, where=where)
        origins.update(_moved(from_, moved))
        notes.extend(map(str, moved))
        run = given.get("run", {})
        for one, other in (("steps", "epochs"), ("epochs", "steps")):  # one choice: the later word counts
            if (
                isinstance(run, Mapping)
                and one in run
                and other not in run
                and isinstance(values.get("run"), Mapping)
            ):
                values = {
                    **values,
                    "run": {key: value for key, value in values["run"].items() if key != other},
                }
        values = merge(values, given)

    if preset is not None:
        given = parse(preset_text(preset), f"preset {preset}")
        layer(given, dict.fromkeys(_keys(given), f"preset {preset}"), f"preset {preset}")
    if path is not None:
        text = read_text(path)
        given, lines = parse(text, str(path)), key_lines(text)
        from_ = {key: _line(key, path.name, lines) for key in [*lines, *_keys(given)] if key != KEY}
        layer(given, from_, f"{path}, {KEY}")
    if base is not None:
        given = nested(base)
        layer(given, dict.fromkeys(_keys(given), "form"), KEY)
    for override in overrides:
        key, sign, text = require_text(override, "--set").partition("=")
        key = key.strip()
        if not sign or not key:
            raise UserError(
                "{given} is no setting", where="--set", mend="write --set section.key=value", given=override
            )
        value = setting_value(key, text.strip())
        if "[" in key:
            values = _set(values, key, value)
            origins[key] = "--set"
        else:
            layer(nested({key: value}), {key: "--set"}, "--set")
    found = validate(values, origins, path)
    return replace(found, notes=(*notes, *found.notes))


def validate(values: Mapping[str, Any], origins: dict[str, str], path: Path | None = None) -> Loaded:
    """Checks all values; fills in the family's proposals where nothing was said. Raises UserErrors."""
    values, moved = today(values)
    origins = _moved(origins, moved)
    wrong_type = misquoted(Config, values, origins)
    errors = [*unknown_keys(Config, values, origins), *wrong_type.values()]
    filled = known_only(Config, values)
    spec = _spec(filled, errors, origins)
    if spec is not None:
        for key, setting in {**spec.settings, **_of_full(filled), **_of_optimizer(filled)}.items():
            if not _has(filled, key):
                filled = merge(filled, nested({key: setting.value}))
                origins[key] = f"family default ({setting.source})"
    config = None
    try:
        config = Config.model_validate(filled)
    except ValidationError as error:
        errors += findings(error.errors(), origins, wrong_type)
    options = filled.get("model", {}).get("options", {}) if isinstance(filled.get("model"), Mapping) else {}
    if spec is not None and isinstance(options, Mapping):
        try:
            options_of(spec.name, options)
        except ValidationError as error:
            errors += option_findings(error.errors(), spec.options, origins)
    if errors:
        errors.sort(key=lambda error: int((re.findall(r" line (\d+)\)", error.where) or [sys.maxsize])[0]))
        raise UserErrors(errors) if len(errors) > 1 else errors[0]
    assert config is not None, "a config that does not validate has findings"
    if not config.run.name:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": _name(config)})})
    every = {**dict.fromkeys(_keys(config.model_dump()), "default"), **origins}
    return Loaded(config, every, path, tuple(map(str, moved)))


def setting_value(key: str, text: str) -> Any:
    """A value written as text (--set, a form's text field): TOML first, plain text else; a text stays one for texts."""
    found = field_of(key)
    if found is not None and section_of(found.annotation) is None and takes_text(found.annotation):
        value = value_of(text)
        return value if isinstance(value, (str, list, dict)) or found.annotation is Any else text
    return value_of(text)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every value that differs between two documents (`Loaded.document`)."""
    one, two = flat(old), flat(new)
    return [
        (key, one.get(key), two.get(key))
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
    ]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}; values that are nested already stay."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner: Any = nested(value) if isinstance(value, Mapping) else value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        found = merge(found, inner)
    return found


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged, anything else of `above` replaces what was there."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        found[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; tables in lists are a.b[0].c."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{key}."))
        elif isinstance(value, (list, tuple)) and value and all(isinstance(one, Mapping) for one in value):
            for index, one in enumerate(value):
                found.update(flat(one, f"{key}[{index}]."))
        else:
            found[key] = value
    return found


def _keys(values: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys of all values, and of the tables around them that may be wrong as a whole."""
    yield from flat(values)


def _moved(origins: Mapping[str, str], moved: Sequence[Moved]) -> dict[str, str]:
    """The origins by today's keys."""
    names = {one.key: one.to for one in moved}
    return {to: text for key, text in origins.items() if (to := names.get(key, key)) is not None}


def _line(key: str, name: str, lines: Mapping[str, int]) -> str:
    inner = key
    while inner and inner not in lines:
        inner = re.sub(r"(\[\d+\]|\.[^.\[\]]+|^[^.\[\]]+)$", "", inner)
    return f"{name} line {lines[inner]}" if inner else name


def _set(values: Mapping[str, Any], key: str, value: Any, before: str = "") -> dict[str, Any]:
    """The values with one changed inside a list (`data.sets[1].weight`). Raises UserError for a place that is not there."""
    part, _, rest = key.partition(".")
    name, bracket, index = part.partition("[")
    if not bracket:
        inner = values.get(part)
        below = inner if isinstance(inner, Mapping) else {}
        return {**values, part: _set(below, rest, value, f"{before}{part}.") if rest else value}
    rows = values.get(name)
    count = len(rows) if isinstance(rows, list) else 0
    number = int(index[:-1]) if index[:-1].isdigit() and index.endswith("]") else count
    if not isinstance(rows, list) or number >= count or not isinstance(rows[number], Mapping) or not rest:
        raise UserError(
            "there is no {key} to change: {name} has {count} entries, counted from 0",
            where="--set",
            mend="add the entry to the config file",
            key=before + key,
            name=before + name,
            count=count,
        )
    changed = _set(rows[number], rest, value, f"{before}{part}.")
    return {**values, name: [*rows[:number], changed, *rows[number + 1 :]]}


def _spec(
    values: Mapping[str, Any], errors: list[UserError], origins: Mapping[str, str]
) -> FamilySpec | None:
    model = values.get("model")
    family = model.get("family") if isinstance(model, Mapping) else None
    if not isinstance(family, str):
        return None  # told as missing or as no text
    known = families()
    if family not in known:
        near = difflib.get_close_matches(family, known, 1)
        errors.append(
            UserError(
                "there is no model family '{family}'",
                where=where("model.family", origins),
                mend="did you mean {near}?" if near else "use one of: {known}",
                family=family,
                near=near[0] if near else "",
                known=", ".join(known),
            )
        )
        return None
    return spec_of(family)


def _of_full(values: Mapping[str, Any]) -> dict[str, Setting]:
    """What full training wants otherwise than adapters, where nothing is said."""
    method = values.get("method")
    if not isinstance(method, Mapping) or method.get("kind") != "full":
        return {}
    return {
        "optimizer.lr": Setting(1e-5, "full training moves every weight: a tenth of an adapter's, or less"),
        "optimizer.name": Setting("adafactor", "full training: it keeps next to nothing for each weight"),
    }


def _of_optimizer(values: Mapping[str, Any]) -> dict[str, Setting]:
    """Prodigy finds the step size itself; its lr is a factor of it."""
    optimizer = values.get("optimizer")
    if isinstance(optimizer, Mapping) and optimizer.get("name") == "prodigy":
        return {"optimizer.lr": Setting(1.0, "of prodigy: Mishchenko and Defazio 2023, arXiv 2306.06101")}
    return {}


def _has(values: Mapping[str, Any], key: str) -> bool:
    inner: Any = values
    for part in key.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return False
        inner = inner[part]
    return True


def _name(config: Config) -> str:
    """FAMILY-FOLDER, of characters that every file system takes."""
    source = next((one.source for one in (config.data, *config.data.sets) if one.source), None) or "run"
    stem = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", _last_name(source)).strip(" ._")
    return f"{config.model.family}-{stem or 'run'}"


def _last_name(path: str) -> str:
    """The last component, whichever system the path was written on."""
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name


def _last_names(values: Any, key: str = "") -> Any:
    """The document with every path cut to its last component."""
    if isinstance(values, Mapping):
        return {name: _last_names(one, f"{key}.{name}" if key else name) for name, one in values.items()}
    if isinstance(values, list):
        return [_last_names(one, key) for one in values]
    found = field_of(key)
    is_path = found is not None and "_path" in repr(found.annotation) + repr(found.metadata)
    return (
        _last_name(values)
        if is_path and isinstance(values, str) and not values.startswith("builtin:")
        else values
    )
