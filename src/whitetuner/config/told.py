"""What is wrong with a config, in the user's words: every mistake with its place, the nearest known name and the mend."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whitetuner.config.schema import Config
from whitetuner.errors import UserError

#: Words of other trainers (their documented options) and of the original's command line -> the option here.
FOREIGN = {
    "learning_rate": "optimizer.lr",
    "lr_scheduler": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "optimizer_type": "optimizer.name",
    "gradient_accumulation_steps": "optimizer.gradient_accumulation",
    "ema_decay": "optimizer.ema",
    "loraplus_lr_ratio": "optimizer.lora_plus",
    "max_train_steps": "run.steps",
    "num_train_steps": "run.steps",
    "train_steps": "run.steps",
    "max_train_epochs": "run.epochs",
    "num_epochs": "run.epochs",
    "output_name": "run.name",
    "checkpoint_every": "save.every",
    "checkpointing_steps": "save.every",
    "save_every_n_steps": "save.every",
    "checkpoints_total_limit": "save.keep",
    "network_dim": "method.rank",
    "lora_rank": "method.rank",
    "lora_dim": "method.rank",
    "network_alpha": "method.alpha",
    "lora_alpha": "method.alpha",
    "lokr_factor": "method.factor",
    "model_id": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "image_folder": "data.images",
    "image_dir": "data.images",
    "target_folder": "data.target",
    "condition_folder": "data.conditions",
    "video_folder": "data.videos",
    "num_repeats": "data.sets.repeats",
    "caption_extension": "data.caption_ext",
    "trigger_word": "data.trigger",
    "shuffle_caption": "data.caption_shuffles",
    "keep_tokens": "data.caption_keep",
    "masked_loss": "data.mask_dir",
    "alpha_mask": "data.mask_alpha",
    "prior_loss_weight": "data.sets.loss_weight",
    "train_batch_size": "data.batch_size",
    "timestep_type": "noise.timesteps",
    "timestep_sampling": "noise.timesteps",
    "shift_scale": "noise.shift",
    "discrete_flow_shift": "noise.shift",
    "loss_weighting_scheme": "noise.loss_weighting",
    "mixed_precision": "memory.dtype",
    "sample_every": "preview.every",
    "sample_prompts": "preview.prompts",
}

#: pydantic's kinds of findings -> (text, name of the bound in its context).
_FINDINGS = {
    "greater_than": ("{value} must be above {bound}", "gt"),
    "greater_than_equal": ("{value} must be at least {bound}", "ge"),
    "less_than": ("{value} must be below {bound}", "lt"),
    "less_than_equal": ("{value} must be at most {bound}", "le"),
    "literal_error": ("{value} is none of: {bound}", "expected"),
    "int_type": ("{value} is not a whole number", ""),
    "int_parsing": ("{value} is not a whole number", ""),
    "int_from_float": ("{value} is not a whole number", ""),
    "float_type": ("{value} is not a number", ""),
    "float_parsing": ("{value} is not a number", ""),
    "finite_number": ("{value} is not a finite number", ""),
    "bool_type": ("{value} is neither true nor false", ""),
    "bool_parsing": ("{value} is neither true nor false", ""),
    "string_type": ("{value} is not a text in quotes", ""),
    "string_pattern_mismatch": ("{value} does not look right", ""),
    "list_type": ("{value} is not a list in [ ]", ""),
    "tuple_type": ("{value} is not a list in [ ]", ""),
    "too_short": ("{value} is too short: {bound} entries are needed", "min_length"),
    "too_long": ("{value} is too long: {bound} entries are taken", "max_length"),
    "dict_type": ("{value} is not a table of settings", ""),
    "model_type": ("{value} is not a table of settings", ""),
}


def unknown_keys(
    schema: type[BaseModel], values: Any, origins: Mapping[str, str], prefix: str = ""
) -> Iterator[UserError]:
    """Every key that the schema does not have, with the nearest that it does (in any section)."""
    if not isinstance(values, Mapping):
        return
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in schema.model_fields:
            near = nearest(key)
            yield UserError(
                "there is no option '{key}'",
                where=where(key, origins),
                mend="did you mean {near}?" if near else "docs/config.md lists all options",
                key=key,
                near=near,
            )
            continue
        inner = section_of(schema.model_fields[name].annotation)
        if inner is None:
            continue
        rows = (
            [(f"{key}[{index}].", one) for index, one in enumerate(value)]
            if isinstance(value, list)
            else [(f"{key}.", value)]
        )
        for below, one in rows:
            yield from unknown_keys(inner, one, origins, below)


def known_only(schema: type[BaseModel], values: Any) -> Any:
    """The values without the keys that the schema does not have."""
    if not isinstance(values, Mapping):
        return values
    found = {}
    for name, value in values.items():
        if name in schema.model_fields:
            inner = section_of(schema.model_fields[name].annotation)
            if inner is not None and isinstance(value, list):
                found[name] = [known_only(inner, one) for one in value]
            else:
                found[name] = value if inner is None else known_only(inner, value)
    return found


def misquoted(
    schema: type[BaseModel], values: Any, origins: Mapping[str, str], prefix: str = ""
) -> dict[str, UserError]:
    """Key -> error, of numbers in quotes and of true or false for a number: pydantic would guess at some of them."""
    found: dict[str, UserError] = {}
    if not isinstance(values, Mapping):
        return found
    for name, value in values.items():
        if name not in schema.model_fields:
            continue  # told by `unknown_keys`
        annotation, key = schema.model_fields[name].annotation, f"{prefix}{name}"
        inner = section_of(annotation)
        if inner is not None:
            rows = (
                [(f"{key}[{i}].", one) for i, one in enumerate(value)]
                if isinstance(value, list)
                else [(f"{key}.", value)]
            )
            for below, one in rows:
                found.update(misquoted(inner, one, origins, below))
        elif isinstance(value, str) and _number(value) and not takes_text(annotation):
            found[key] = UserError(
                'the text "{value}" stands where {key} takes a number',
                where=where(key, origins),
                mend="write it without quotes: {name} = {value}",
                value=value,
                key=key,
                name=name,
            )
        elif isinstance(value, bool) and not takes_bool(annotation):
            found[key] = UserError(
                "{key} does not take true or false",
                where=where(key, origins),
                mend="{help}",
                key=key,
                help=description(key),
            )
    return found


def findings(
    errors: Iterable[Mapping[str, Any]], origins: Mapping[str, str], skip: Iterable[str] = ()
) -> list[UserError]:
    """pydantic's findings, one per key; `skip`: keys that were told already."""
    skipped, by_key = set(skip), dict[str, list[Mapping[str, Any]]]()
    for error in errors:
        key = dotted(error["loc"])
        if key not in skipped:
            by_key.setdefault(key, []).append(error)
    return [_finding(key, several, origins, description(key)) for key, several in by_key.items()]


def option_findings(
    errors: Iterable[Mapping[str, Any]], schema: type[BaseModel], origins: Mapping[str, str]
) -> list[UserError]:
    """Findings about [model.options]; schema: the family's options."""
    told, known = [], list(schema.model_fields)
    for error in errors:
        name = str(error["loc"][0]) if error["loc"] else ""
        key = f"model.options.{name}" if name else "model.options"
        if error["type"] != "extra_forbidden":
            help_text = schema.model_fields[name].description if name in schema.model_fields else ""
            told.append(_finding(key, [error], origins, help_text or ""))
            continue
        near = difflib.get_close_matches(name, known, 1)
        told.append(
            UserError(
                "this family has no option '{name}'",
                where=where(key, origins),
                mend="did you mean model.options.{near}?" if near else "it has: {known}",
                name=name,
                near=near[0] if near else "",
                known=", ".join(known) or "none",
            )
        )
    return told


def where(key: str, origins: Mapping[str, str]) -> str:
    """The key with the place its value came from: its own, else that of the table around it or of the first key inside."""
    outer = [key[:end] for end in range(len(key), 0, -1) if end == len(key) or key[end] in ".["]
    inside = [one for one in origins if one.startswith((f"{key}.", f"{key}["))]
    for one in (*outer, *inside):
        if origins.get(one, "default") != "default":
            return f"{key} ({origins[one]})"
    return key


def nearest(key: str) -> str:
    """The known dotted name that was probably meant; "" when nothing is near."""
    every = list(keys_of(Config))
    name, plain = key.rpartition(".")[2], _without_index(key)
    same = [one for one in every if one.rpartition(".")[2] == name]
    if same or name in FOREIGN:
        return same[0] if same else FOREIGN[name]
    close = difflib.get_close_matches(plain, every, 1, 0.75)
    if close:
        return close[0]
    by_name = {one.rpartition(".")[2]: one for one in reversed(every)}
    return next((by_name[one] for one in difflib.get_close_matches(name, by_name, 1, 0.75)), "")


def description(key: str) -> str:
    """What the schema says of a key; "" for one it does not have."""
    found = field_of(key)
    return (found.description or "") if found is not None else ""


def field_of(key: str) -> FieldInfo | None:
    """The schema's field of a dotted key (`data.sets[0].images` too)."""
    schema: type[BaseModel] | None = Config
    found = None
    for part in _without_index(key).split("."):
        if schema is None or part not in schema.model_fields:
            return None
        found = schema.model_fields[part]
        schema = section_of(found.annotation)
    return found


def keys_of(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted name, sections included."""
    for name, info in schema.model_fields.items():
        inner = section_of(info.annotation)
        yield f"{prefix}{name}"
        if inner is not None:
            yield from keys_of(inner, f"{prefix}{name}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The table type of a field, also inside a list; None for a plain value."""
    for one in (annotation, *typing.get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def takes_text(annotation: Any) -> bool:
    """Whether any text will do (not only fixed words such as "auto")."""
    return str in _parts(annotation)


def takes_bool(annotation: Any) -> bool:
    """Whether true and false are among the values of an option of this type."""
    return bool in _parts(annotation)


def _parts(annotation: Any) -> list[Any]:
    """The plain types of a union; containers and Any stay as they are and count as text and bool, being unchecked here."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [part for one in typing.get_args(annotation) for part in _parts(one)]
    if origin is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    return [str, bool] if annotation is Any or origin is dict else [annotation]


def dotted(loc: Iterable[Any]) -> str:
    """pydantic's location as a dotted key; the branches of a union that it names are left out."""
    key = ""
    for part in loc:
        if isinstance(part, int):
            key += f"[{part}]"
        elif field_of(f"{key}.{part}" if key else part) is not None or key.startswith("model.options"):
            key += f".{part}" if key else part
    return key


def _finding(
    key: str, errors: list[Mapping[str, Any]], origins: Mapping[str, str], help_text: str
) -> UserError:
    error, value = errors[0], json.dumps(errors[0].get("input"), ensure_ascii=False, default=str)[:80]
    place, message = where(key, origins), str(error["msg"]).removeprefix("Value error, ")
    if len(errors) > 1:  # one of several kinds of values, none of which it is
        message = " or ".join(_wanted(one) for one in errors)
        return UserError(
            "{value} is not {message}",
            where=place,
            mend="{help}",
            value=value,
            message=message,
            help=help_text,
        )
    if error["type"] == "missing":
        if _is_section(key):  # [model] is the only table that has to be there
            return _finding("model.family", errors, origins, description("model.family"))
        return UserError("{key} is not given", where=place, mend="add it: {help}", key=key, help=help_text)
    if error["type"] == "value_error" and _is_section(key):
        return UserError(
            "{message}", where=place, mend="docs/config.md tells all of [{key}]", message=message, key=key
        )
    if error["type"] in _FINDINGS:
        text, bound = _FINDINGS[error["type"]]
        limit, near = error.get("ctx", {}).get(bound, ""), _near_word(error)
        mend = (
            'did you mean "{near}"?'
            if near
            else "{help}"
            if help_text
            else "docs/config.md lists all options"
        )
        return UserError(text, where=place, mend=mend, value=value, bound=limit, help=help_text, near=near)
    return UserError(
        "{value}: {message}", where=place, mend="{help}", value=value, message=message, help=help_text
    )


def _wanted(error: Mapping[str, Any]) -> str:
    """What one branch of a union takes: "'auto'", "a whole number", "greater than 0"."""
    message = (
        str(error["msg"]).removeprefix("Input should be ").split(", unable")[0].replace("a valid ", "a ")
    )
    return message.replace("a integer", "a whole number").replace("a boolean", "true or false")


def _is_section(key: str) -> bool:
    """Whether the key names a table rather than a value."""
    found = field_of(key)
    return found is None or section_of(found.annotation) is not None


def _near_word(error: Mapping[str, Any]) -> str:
    if error["type"] != "literal_error" or not isinstance(error.get("input"), str):
        return ""
    words = [one.strip("'") for one in str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
    return next(iter(difflib.get_close_matches(error["input"].lower(), words, 1)), "")


def _without_index(key: str) -> str:
    return "".join(part.partition("]")[2] if index else part for index, part in enumerate(key.split("[")))


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false")
    return True
