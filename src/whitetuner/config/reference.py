"""docs/config.md, written from the schema: `python -m whitetuner.config.reference` after a change of it."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whitetuner.config.landed import not_landed
from whitetuner.config.options import families, spec_of
from whitetuner.config.preset import presets
from whitetuner.config.resume import FREE
from whitetuner.config.schema import Config, DataSet, Prompt, SetFields
from whitetuner.config.told import section_of

_HEAD = """\
# Config

<!-- Written by `python -m whitetuner.config.reference`; change the descriptions in src/whitetuner/config instead. -->

A run is one TOML file. `whitetuner init PRESET -o my.toml` writes one to begin with (presets: {presets}),
`whitetuner check my.toml` tells everything that is wrong with it at once, `whitetuner train my.toml` trains.

- What wins: `--set section.key=value` over the file over a preset over the family's proposals over the defaults below.
  `run.json` in the run's folder says of every value where it came from.
- `--set` values are TOML first (`--set optimizer.lr=2e-4`, `--set 'data.resolution=[512, 768]'`), plain text else
  (`--set run.name=cat`). `--set data.sets[1].weight=2` reaches into a list; entries are counted from 0.
- Paths: write them in single quotes, `'C:\\pictures\\cat'`, or with `/`; in `"..."` a backslash begins an escape.
  Relative paths are relative to the folder that the command is started in.
- `run.steps` and `run.epochs` are one choice: where both are given in different places, the one that wins counts.
- A misspelt key is an error that names the nearest known one. "Not yet" and "so far only" mark what is refused until
  its feature is there.
- `--resume latest` goes on with a run. May change then: {free}. Everything else is refused with the reason.
"""


def text() -> str:
    """The whole document."""
    free = ", ".join(
        f"`[{one[:-1]}]`" if one.endswith(".") else f"`{one}`"
        for one in FREE
        if not one.startswith("data.sets.")
    )
    lines = [_HEAD.format(presets=", ".join(f"`{name}`" for name in presets()), free=free)]
    refused = not_landed()
    for name, info in Config.model_fields.items():
        schema = section_of(info.annotation)
        assert schema is not None
        lines += _table(f"[{name}]", schema, name, refused)
        if name == "data":
            own = {key: one for key, one in DataSet.model_fields.items() if key not in SetFields.model_fields}
            lines += [
                "### [[data.sets]]",
                "",
                f"The keys of `[data]` down to `{list(SetFields.model_fields)[-1]}`, and:",
                "",
                *_rows(own, "data.sets", refused),
            ]
        if name == "preview":
            lines += _table("[[preview.prompts]]", Prompt, "preview.prompts", refused)
        if name == "model":
            for family in families():
                spec = spec_of(family)
                lines += [f'### [model.options] of {spec.title} (`family = "{family}"`)', ""]
                lines += _rows(spec.options.model_fields, "model.options", {})
                lines += [
                    "Its proposals, used where nothing is said:",
                    "",
                    "| key | value | source |",
                    "|---|---|---|",
                ]
                lines += [
                    f"| {key} | `{_toml(one.value)}` | {one.source} |" for key, one in spec.settings.items()
                ]
                lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _table(
    title: str, schema: type[BaseModel], prefix: str, refused: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    level = "###" if title.startswith("[[") else "##"
    about = (schema.__doc__ or "").strip().partition(": ")[2].strip()
    return [
        f"{level} {title}",
        "",
        f"{about[:1].upper()}{about[1:]}",
        "",
        *_rows(schema.model_fields, prefix, refused),
    ]


def _rows(fields: dict[str, FieldInfo], prefix: str, refused: Mapping[str, tuple[Any, ...]]) -> list[str]:
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for name, info in fields.items():
        if section_of(info.annotation) is not None:
            continue
        given = info.get_default(call_default_factory=True)
        default = "**needed**" if info.is_required() else "unset" if given is None else f"`{_toml(given)}`"
        later = ""
        if f"{prefix}.{name}" in refused:
            works = [
                _toml(one) for one in (given, *refused[f"{prefix}.{name}"]) if one not in (None, [], False)
            ]
            later = f" *So far only {', '.join(works)}.*" if works else " *Not yet.*"
        takes = ", ".join(dict.fromkeys(_kinds(info.annotation, info.metadata))).replace("|", "\\|")
        rows.append(
            f"| {name} | {takes} | {default} | {str(info.description).replace('|', chr(92) + '|')}{later} |"
        )
    return [*rows, ""]


def _kinds(annotation: Any, metadata: typing.Sequence[Any] = ()) -> Iterator[str]:
    """In words what a field takes, with its bounds."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        extra = [
            one for item in inner[1:] for one in (item.metadata if isinstance(item, FieldInfo) else [item])
        ]
        yield from _kinds(inner[0], extra)
    elif origin in (typing.Union, types.UnionType):
        for one in inner:
            if one is not type(None):
                yield from _kinds(one, metadata)
    elif origin is typing.Literal:
        yield from (f"`{_toml(one)}`" for one in inner)
    elif origin in (list, tuple):
        yield f"list of {' or '.join(dict.fromkeys(_kinds(inner[0])))}"
    elif annotation is dict or origin is dict:
        yield "table"
    elif annotation is bool:
        yield "true, false"
    elif annotation is str:
        yield "path" if any("_path" in repr(one) for one in metadata) else "text"
    else:
        yield {int: "whole number", float: "number"}[annotation] + _bounds(metadata)


def _bounds(metadata: typing.Sequence[Any]) -> str:
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    found = [
        f"{sign} {getattr(one, name):g}" for name, sign in signs for one in metadata if hasattr(one, name)
    ]
    return f" {', '.join(found)}" if found else ""


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


if __name__ == "__main__":
    target = Path(__file__).parents[3] / "docs" / "config.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text(), encoding="utf-8", newline="\n")
    print(f"wrote {target}")
