"""The form's fields, drawn from the config schema: kind of control, tier, bounds and default of every option."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whitetuner.config.landed import not_landed
from whitetuner.config.schema import Config
from whitetuner.config.told import section_of
from whitetuner.families import registry
from whitetuner.family import FamilySpec

Kind = Literal[
    "bool", "choice", "number", "text", "long", "path", "paths", "texts", "numbers", "table", "rows"
]
Tier = Literal["basic", "advanced", "expert"]

_OF_VIDEOS = (
    "method.kind model.path model.options.variant model.options.expert "
    "data.videos data.num_frames run.name run.steps optimizer.lr"
)
#: The first look of a tab, at most eight and the family's own: what is learned from, with what, how long.
_BASIC = {
    "t2i": "method.kind model.path data.images data.trigger data.resolution run.name run.steps optimizer.lr",
    "edit": "method.kind model.path data.target data.conditions data.prompt run.name run.steps optimizer.lr",
    "i2v": _OF_VIDEOS,
    "t2v": _OF_VIDEOS,
}
#: What is turned next; the family's own options belong here too.
_ADVANCED = [
    "run.output_dir",
    "run.resume",
    "data.resolution",
    "data.prompt",
    "data.default_caption",
    "data.caption_dropout",
    "data.batch_size",
    "data.sets",
    "method.rank",
    "method.factor",
    "noise.timesteps",
    "noise.shift",
    "optimizer.name",
    "optimizer.schedule",
    "optimizer.gradient_accumulation",
    "memory.vram_gb",
    "memory.base",
    "memory.blocks_to_swap",
    "save.every",
    "preview.every",
    "preview.prompts",
]
#: Folders that only some tasks learn from; elsewhere they wait among the rest.
_OF_TASK = {"data.prompt": ("edit",)}
#: The tab says these.
FIXED = ("model.family", "model.task")
_LONG = ("prompt", "default_caption", "text", "negative")
_FILES = ("init_from", "preview.prompts.images", "merge_adapter")


@dataclass(frozen=True)
class FormField:
    """One option of the form.

    key:     dotted, without indices ("data.sets.images" is one row's)
    choices: fixed words that it takes, as they stand in the file ("auto", true)
    default: what holds when nothing is said; source: why, when the family proposes it
    wants:   of a path: "folder", "file" or "any"
    later:   None: all of it works; else the values (besides the default) that work already
    """

    key: str
    kind: Kind
    tier: Tier
    choices: tuple[Any, ...] = ()
    default: Any = None
    source: str = ""
    unset: bool = False
    needed: bool = False
    minimum: float | None = None
    maximum: float | None = None
    wants: str = ""
    rows: tuple[FormField, ...] = ()
    later: tuple[Any, ...] | None = None

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]


def form_fields(spec: FamilySpec, task: str) -> tuple[FormField, ...]:
    """Every option of a family's form: the basic ones first, the rest in the schema's order; rows of lists hang at their list."""
    basic = _BASIC[task].split()
    found: list[FormField] = []
    for name, info in Config.model_fields.items():
        schema = section_of(info.annotation)
        assert schema is not None
        found += _of_section(schema, name, spec, task, basic)
    order = {key: number for number, key in enumerate(basic)}
    return tuple(sorted(found, key=lambda field: order.get(field.key, len(order))))


def field_keys(fields: Sequence[FormField]) -> Iterator[str]:
    """All dotted keys, those of rows included."""
    for field in fields:
        yield field.key
        yield from field_keys(field.rows)


def open_tasks(family: str) -> tuple[str, ...]:
    """Tasks of a family that can be trained today."""
    refused = not_landed()
    works = ("t2i", *refused["model.task"]) if "model.task" in refused else None
    return tuple(task for task in registry.spec(family).tasks if works is None or task in works)


def all_fields() -> dict[tuple[str, str], tuple[FormField, ...]]:
    """(family, task) -> its form, for everything that can be trained."""
    return {
        (name, task): form_fields(registry.spec(name), task)
        for name in registry.FAMILIES
        for task in open_tasks(name)
    }


def _of_section(
    schema: type[BaseModel], prefix: str, spec: FamilySpec, task: str, basic: Sequence[str]
) -> Iterator[FormField]:
    for name, info in schema.model_fields.items():
        key = f"{prefix}.{name}"
        if key == "model.options":
            for option, about in spec.options.model_fields.items():
                own = f"{key}.{option}"
                yield _field(own, about, spec, "basic" if own in basic else "advanced")
            continue
        yield _field(key, info, spec, _tier(key, task, basic))


def _tier(key: str, task: str, basic: Sequence[str]) -> Tier:
    if key in basic:
        return "basic"
    return "advanced" if key in _ADVANCED and task in _OF_TASK.get(key, (task,)) else "expert"


def _field(key: str, info: FieldInfo, spec: FamilySpec, tier: Tier) -> FormField:
    inner = section_of(info.annotation)
    later = not_landed().get(key.replace("data.sets.", "data."))
    if inner is not None:
        rows = tuple(_field(f"{key}.{name}", one, spec, tier) for name, one in inner.model_fields.items())
        return FormField(key, "rows", tier, rows=rows, later=later)
    plain, words, metadata = _takes(info.annotation, info.metadata)
    proposal = spec.settings.get(key)
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    low, high = _bounds(metadata)
    return FormField(
        key,
        _kind(key, plain, words, metadata),
        tier,
        choices=_choices(plain, words),
        default=default if proposal is None else proposal.value,
        source="" if proposal is None else proposal.source,
        unset=default is None and proposal is None,
        needed=info.is_required(),
        minimum=low,
        maximum=high,
        wants=_wants(key) if any("_path" in repr(one) for one in metadata) else "",
        later=later,
    )


def _takes(annotation: Any, metadata: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """(plain types and containers, fixed words, all constraints) that an annotation is made of."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        extra = [
            one for item in inner[1:] for one in (item.metadata if isinstance(item, FieldInfo) else [item])
        ]
        return _takes(inner[0], [*metadata, *extra])
    if origin in (typing.Union, types.UnionType):
        parts = [_takes(one, metadata) for one in inner if one is not type(None)]
        return (
            [kind for part in parts for kind in part[0]],
            [word for part in parts for word in part[1]],
            [one for part in parts for one in part[2]],
        )
    if origin is typing.Literal:
        return [], list(inner), list(metadata)
    if origin in (list, tuple):
        of, _, limits = _takes(inner[0], ())
        return [(list, of[0])], [], [*metadata, *limits]
    return [dict if origin is dict else annotation], [], list(metadata)


def _kind(key: str, plain: Sequence[Any], words: Sequence[Any], metadata: Sequence[Any]) -> Kind:
    if plain == [bool]:
        return "choice" if words else "bool"
    if not plain:
        return "choice"
    if plain[0] is dict:
        return "table"
    lists = [one[1] for one in plain if isinstance(one, tuple)]
    is_path = any("_path" in repr(one) for one in metadata)
    if lists:
        return "numbers" if lists[0] in (int, float) else "paths" if is_path else "texts"
    if plain[0] in (int, float):
        return "number"
    return "path" if is_path else "long" if key.rpartition(".")[2] in _LONG else "text"


def _choices(plain: Sequence[Any], words: Sequence[Any]) -> tuple[Any, ...]:
    return (*words, True, False) if plain == [bool] and words else tuple(words)


def _bounds(metadata: Sequence[Any]) -> tuple[float | None, float | None]:
    low = [getattr(one, name) for one in metadata for name in ("gt", "ge") if hasattr(one, name)]
    high = [getattr(one, name) for one in metadata for name in ("lt", "le") if hasattr(one, name)]
    return (float(low[0]) if low else None), (float(high[0]) if high else None)


def _wants(key: str) -> str:
    if key.endswith(_FILES):
        return "file"
    return "any" if key.startswith("model.") else "folder"
