"""What an importer says: the settings in our names, and for each of theirs where it went or why it stayed behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from whitetuner.errors import UserError

#: Their value -> ours. Raises ValueError with the reason when there is none.
Convert = Callable[[Any], Any]
Table = Mapping[str, tuple[str, Convert]]


@dataclass
class Imported:
    """program: whose config it was; values: dotted key -> value; carried: (theirs, ours); left: (theirs, why)."""

    program: str
    values: dict[str, Any] = field(default_factory=dict)
    carried: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def put(self, theirs: str, key: str, value: Any) -> None:
        """One setting taken over."""
        self.values[key] = value
        self.carried.append((theirs, f"{key} = {value}" if not isinstance(value, (list, dict)) else key))

    def leave(self, theirs: str, why: str) -> None:
        self.left.append((theirs, why))

    def take(self, given: Mapping[str, Any], table: Table, idle: Mapping[str, str], place: str = "") -> None:
        """Everything of one of their tables: by `table` where it has a place, with the reason of `idle` where it needs none.

        idle: their name -> why nothing is lost ("" : switched off, or a default); place: put before their names in the report
        """
        for name, value in given.items():
            if value is None or (isinstance(value, (Mapping, list)) and not value):
                continue
            told = f"{place}{name} = {value}"
            if name in table:
                key, convert = table[name]
                try:
                    self.put(f"{place}{name}", key, convert(value))
                except (ValueError, TypeError, KeyError) as error:
                    self.leave(told, str(error).strip("'") or "this value has no counterpart")
            elif name in idle:
                if idle[name] and value not in (False, 0, 0.0, ""):
                    self.leave(told, idle[name])
            elif value not in (False, "", 0, 0.0):
                self.leave(told, "there is nothing like it here")


def same(value: Any) -> Any:
    """The value as it is."""
    return value


def one_of(words: Mapping[str, Any], why: str = "there is nothing like it here") -> Convert:
    """By a list of their words, in any case."""

    def convert(value: Any) -> Any:
        try:
            return words[str(value).lower()]
        except KeyError:
            raise ValueError(why) from None

    return convert


OPTIMIZERS = one_of(
    {
        **dict.fromkeys(("adamw", "adam", "torch.optim.adamw"), "adamw"),
        **dict.fromkeys(("adamw8bit", "bitsandbytes.optim.adamw8bit", "adam8bit"), "adamw8bit"),
        "adafactor": "adafactor",
        "prodigy": "prodigy",
    },
    'set optimizer.name = "module:Class" for it',
)
SCHEDULES = one_of(
    {
        **dict.fromkeys(("constant", "constant_with_warmup"), "constant"),
        "linear": "linear",
        **dict.fromkeys(("cosine", "cosine_with_min_lr"), "cosine"),
    },
    "constant, linear and cosine are there",
)


#: Of a set that others shuffle anew at every visit: orders that are encoded once here.
SHUFFLES = 4


def shuffles(value: Any) -> int:
    """Their switch -> `caption_shuffles`."""
    return SHUFFLES if value else 0


def what_counts(mine: Imported, floor: float, keep: int, loss_weight: float) -> None:
    """Of a set whose masks and shuffles were taken over: how much the rest counts, tags that stay, the weight of its loss."""
    if mine.values.get("mask_dir") or mine.values.get("mask_alpha"):
        mine.put("masks", "mask_floor", floor)
    if mine.values.get("caption_shuffles"):
        mine.put("keep_tokens", "caption_keep", keep)
    if loss_weight != 1:
        mine.put("is_reg", "loss_weight", loss_weight * mine.values.get("loss_weight", 1.0))


def sets_into(values: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Puts data sets into a config: a single one into [data], where it says nothing that only [[data.sets]] can."""
    if len(rows) == 1 and not {"repeats", "loss_weight"} & rows[0].keys():
        values.update({f"data.{key}": value for key, value in rows[0].items()})
    elif rows:
        values["data.sets"] = rows


def ending(value: Any) -> str:
    """ "txt" or ".txt" -> ".txt"."""
    return f".{str(value).lstrip('.')}"


def refuse_model(program: str, name: object, known: Mapping[str, Any]) -> UserError:
    """What is told of a model that we have not; known: the other program's names of those that we have."""
    return UserError(
        "{program}'s model '{name}' cannot be trained here",
        where="--from",
        mend="models that can: {known}",
        program=program,
        name=name,
        known=", ".join(known),
    )
