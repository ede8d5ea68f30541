"""File, preset and --set -> one Config, with the origin of every value; all mistakes told at once."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel, ValidationError

from whitetuner.config.document import key_lines, parse, read_text, value_of
from whitetuner.config.options import options_of, spec_of
from whitetuner.config.schema import Config
from whitetuner.errors import UserError, UserErrors
from whitetuner.version import __version__


@dataclass(frozen=True)
class Loaded:
    """config; origins: dotted key -> "FILE line 3" | "--set" | "preset NAME" | "family default (source)" | "default"."""

    config: Config
    origins: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return self.config.model_dump(mode="json")

    def metadata(self) -> dict[str, str]:
        """What files of this run carry about it: nothing that changes from run to run of the same config."""
        return {
            "whitetuner_version": __version__,
            "whitetuner_config": json.dumps(self.document(), sort_keys=True),
        }


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    preset: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> Loaded:
    """The config of a file (or of the mapping `base`, as a form gives it), preset below, overrides above.

    Order: --set > file > preset > the family's proposals > defaults. Raises UserError(s).
    """
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    if preset is not None:
        values = parse(preset_text(preset), f"preset {preset}")
        origins.update(dict.fromkeys(_keys(values), f"preset {preset}"))
    if path is not None:
        text = read_text(path)
        given, lines, name = parse(text, str(path)), key_lines(text), path.name
        origins.update({key: f"{name} line {lines[key]}" if key in lines else name for key in _keys(given)})
        values = merge(values, given)
    if base is not None:
        given = nested(base)
        origins.update(dict.fromkeys(_keys(given), "form"))
        values = merge(values, given)
    for override in overrides:
        key, sign, text = override.partition("=")
        key = key.strip()
        if not sign or not key:
            raise UserError(
                "{given} is no setting", where="--set", mend="write --set section.key=value", given=override
            )
        values = merge(values, nested({key: value_of(text.strip())}))
        origins[key] = "--set"
    return validate(values, origins)


def validate(values: Mapping[str, Any], origins: dict[str, str]) -> Loaded:
    """Checks all values; fills in the family's proposals where nothing was said."""
    errors = list(_unknown(Config, values, "", origins)) + list(
        _texts_for_numbers(Config, values, "", origins)
    )
    if errors:
        raise UserErrors(errors)
    family = values.get("model", {}).get("family") if isinstance(values.get("model"), Mapping) else None
    filled = dict(values)
    if isinstance(family, str):
        settings = spec_of(family).settings
        for key, setting in settings.items():
            if not _has(values, key):
                filled = merge(filled, nested({key: setting.value}))
                origins[key] = f"family default ({setting.source})"
    try:
        config = Config.model_validate(filled)
    except ValidationError as error:
        raise UserErrors([_told(one, origins) for one in error.errors()]) from error
    try:
        options_of(config.model.family, config.model.options)
    except ValidationError as error:
        raise UserErrors(
            [_told({**one, "loc": ("model", "options", *one["loc"])}, origins) for one in error.errors()]
        ) from error
    if not config.run.name:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": _name(config)})})
    return Loaded(config, {**dict.fromkeys(_keys(config.model_dump()), "default"), **origins})


def dump_config(config: Config) -> str:
    """The config as TOML with every value; loading it gives the same Config."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items() if one is not None}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        return value

    return tomlkit.dumps(plain(config.model_dump(mode="python", exclude_defaults=False)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every value that differs between two documents."""
    one, two = flat(old), flat(new)
    return [
        (key, one.get(key), two.get(key))
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
    ]


def presets() -> dict[str, str]:
    """Name -> first line of each preset."""
    folder = resources.files("whitetuner.config") / "presets"
    files = sorted((one for one in folder.iterdir() if one.name.endswith(".toml")), key=lambda one: one.name)
    return {
        one.name.removesuffix(".toml"): one.read_text(encoding="utf-8").split("\n")[0].lstrip("# ")
        for one in files
    }


def preset_text(name: str) -> str:
    """The commented TOML of a preset. Raises UserError with the known names."""
    known = presets()
    if name not in known:
        raise UserError(
            "there is no preset '{name}'",
            where="PRESET",
            mend="use one of: {known}",
            name=name,
            known=", ".join(known),
        )
    return (resources.files("whitetuner.config") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


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
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _keys(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in flat(values).items():
        yield key
        if isinstance(value, list):
            for index, one in enumerate(value):
                if isinstance(one, Mapping):
                    yield from (f"{key}[{index}].{inner}" for inner in flat(one))


def _has(values: Mapping[str, Any], key: str) -> bool:
    inner: Any = values
    for part in key.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return False
        inner = inner[part]
    return True


def _name(config: Config) -> str:
    source = config.data.images or config.data.target or config.data.videos
    if source is None and config.data.sets:
        source = config.data.sets[0].images or config.data.sets[0].target or config.data.sets[0].videos
    stem = "".join(
        c if c not in '<>:"/\\|?*' and c >= " " else "_" for c in Path(source or "run").name
    ).strip(" .")
    return f"{config.model.family}-{stem or 'run'}"


def _where(key: str, origins: Mapping[str, str]) -> str:
    origin = origins.get(key)
    return f"{key} ({origin})" if origin and origin != "default" else key


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for one in (annotation, *typing.get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def _schema_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in schema.model_fields.items():
        inner = _section_of(info.annotation)
        yield f"{prefix}{name}"
        if inner is not None:
            yield from _schema_keys(inner, f"{prefix}{name}.")


def _unknown(
    schema: type[BaseModel], values: Any, prefix: str, origins: Mapping[str, str]
) -> Iterator[UserError]:
    """Every key that the schema does not have, with the nearest that it does (in any section)."""
    if not isinstance(values, Mapping):
        return
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in schema.model_fields:
            every = list(_schema_keys(Config))
            same = [one for one in every if one.rpartition(".")[2] == name and "[" not in one]
            near = (
                same
                or difflib.get_close_matches(key, every, 1, 0.6)
                or [
                    one
                    for one in every
                    if difflib.SequenceMatcher(None, one.rpartition(".")[2], name).ratio() > 0.75
                ]
            )
            yield UserError(
                "there is no option '{key}'",
                where=_where(key, origins),
                mend="did you mean {near}?" if near else "docs/config.md lists all options",
                key=key,
                near=near[0] if near else "",
            )
            continue
        inner = _section_of(schema.model_fields[name].annotation)
        if inner is None:
            continue
        if isinstance(value, list):
            for index, one in enumerate(value):
                yield from _unknown(inner, one, f"{key}[{index}].", origins)
        else:
            yield from _unknown(inner, value, f"{key}.", origins)


def _takes_text(annotation: Any) -> bool:
    if annotation is str or annotation is Any:
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return any(isinstance(one, str) for one in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_takes_text(one) for one in typing.get_args(annotation))
    return False


def _texts_for_numbers(
    schema: type[BaseModel], values: Any, prefix: str, origins: Mapping[str, str]
) -> Iterator[UserError]:
    """Numbers and booleans in quotes: pydantic would read some of them and choke on others."""
    if not isinstance(values, Mapping):
        return
    for name, value in values.items():
        if name not in schema.model_fields:
            continue  # told by `_unknown`
        info, key = schema.model_fields[name], f"{prefix}{name}"
        inner = _section_of(info.annotation)
        if inner is not None:
            rows = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, one in rows:
                yield from _texts_for_numbers(
                    inner, one, f"{key}." if index is None else f"{key}[{index}].", origins
                )
            continue
        number = isinstance(value, str) and _looks_like_number(value)
        if number and (not _takes_text(info.annotation) or _is_choice(info.annotation)):
            yield UserError(
                '"{value}" is a text, but {key} takes a number',
                where=_where(key, origins),
                mend="write it without quotes: {name} = {value}",
                value=value,
                key=key,
                name=name,
            )
        elif isinstance(value, bool) and not _takes_bool(info.annotation):
            yield UserError(
                "{key} does not take true or false",
                where=_where(key, origins),
                mend="docs/config.md says what it takes",
                key=key,
            )


def _is_choice(annotation: Any) -> bool:
    """True where the only texts taken are fixed words ("auto" | number)."""
    return str not in (annotation, *typing.get_args(annotation)) and annotation is not Any


def _takes_bool(annotation: Any) -> bool:
    parts = (annotation, *typing.get_args(annotation))
    return bool in parts or Any in parts or dict in [typing.get_origin(one) for one in parts]


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false")
    return True


def _told(error: Mapping[str, Any], origins: Mapping[str, str]) -> UserError:
    """pydantic's finding in the user's words."""
    key = ""
    for part in error["loc"]:
        if isinstance(part, int):
            key += f"[{part}]"
        elif not (
            part.startswith(("literal[", "function-", "list[", "constrained"))
            or part in ("int", "float", "str", "bool")
        ):
            key += f".{part}" if key else part
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return UserError(
            "{key} is not given", where=_where(key, origins), mend="add it to the config", key=key
        )
    return UserError(
        "{value} does not fit: {message}",
        where=_where(key, origins),
        mend="docs/config.md says what {key} takes",
        value=json.dumps(error.get("input"), ensure_ascii=False, default=str)[:80],
        message=message,
        key=key,
    )
