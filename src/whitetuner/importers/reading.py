"""From another trainer's config file to a config of ours, with a report of what could not be carried over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
import yaml

from whitetuner.config.document import parse, read_text
from whitetuner.config.load import load_config, nested
from whitetuner.errors import UserError, UserErrors
from whitetuner.importers import ai_toolkit, musubi, original
from whitetuner.importers.carried import Imported
from whitetuner.importers.typed import command_line
from whitetuner.tongue import told

PROGRAMS = (ai_toolkit.NAME, musubi.NAME, original.NAME)


def import_config(path: Path, data: Path | None = None, family: str | None = None) -> Imported:
    """Reads a config of ai-toolkit, musubi-tuner, kohya or the original White Tuner; every value has been checked.

    path: YAML, JSON, TOML, or a shell or batch file with the training's command line; data: musubi-tuner's and kohya's data
    set file, where the training's does not name it; family: where the file does not tell it.
    Raises UserError for a file that is none of these, and for a model that is none of ours.
    """
    document = document_of(read_text(path), path.name)
    return import_document(document, str(path), _data_of(document, path, data), family)


def import_document(
    document: Mapping[str, Any], where: str, data: Mapping[str, Any] | None = None, family: str | None = None
) -> Imported:
    """As `import_config`, of what was read; where: for messages."""
    if musubi.is_data(document):
        raise UserError(
            "this is the data set's half of a training; the other half says which model",
            where=where,
            mend="give the training's config file or script to --from, and this one to --data",
        )
    if not is_foreign(document):
        raise UserError(
            "no trainer's config is recognised in this file",
            where=where,
            mend="known are those of {programs}",
            programs=", ".join(PROGRAMS),
        )
    try:
        found = _read(document, data, family)
    except (
        AttributeError,
        TypeError,
        ValueError,
        KeyError,
        IndexError,
    ) as error:  # a list where a table belongs, ...
        raise UserError(
            "the file is not built as its program builds it ({reason})",
            where=where,
            mend="load it there and save it again",
            reason=error,
        ) from error
    _drop_refused(found)
    return found


def is_foreign(document: Mapping[str, Any]) -> bool:
    """Whether it is another trainer's."""
    return (
        ai_toolkit.is_one(document)
        or original.is_one(document)
        or musubi.is_data(document)
        or (
            not isinstance(document.get("model"), Mapping)
            and (musubi.is_training(document) or "script" in document)
        )
    )


def _read(document: Mapping[str, Any], data: Mapping[str, Any] | None, family: str | None) -> Imported:
    if ai_toolkit.is_one(document):
        return ai_toolkit.read(document)
    if original.is_one(document):
        return original.read(document, family)
    return musubi.read(document, data)


def as_toml(found: Imported) -> str:
    """The config, with what stayed behind as comments on top."""
    head = [f"# From a config of {found.program}. Check the paths, then: whitetuner check THIS_FILE"]
    head += [f"# not carried over: {theirs} ({why})".replace("\n", " ") for theirs, why in found.left]
    return "\n".join(head) + "\n\n" + tomlkit.dumps(nested(found.values))


def report(found: Imported) -> str:
    """For the screen: both lists."""
    lines = [f"{found.program}: {len(found.carried)} settings carried over"]
    lines += [f"  {theirs:<44} -> {ours}" for theirs, ours in found.carried]
    lines += [f"{len(found.left)} not carried over"]
    return "\n".join([*lines, *(f"  {theirs:<44} {told(why)}" for theirs, why in found.left)])


def document_of(text: str, name: str) -> dict[str, Any]:
    """What a file says, by the ending of its name; {} when that is nothing. Raises UserError when it cannot be read."""
    ending = Path(name).suffix.lower()
    if ending == ".toml":
        return parse(text, name)
    try:
        if ending == ".json":
            found = json.loads(text)
        elif ending in (".yaml", ".yml"):
            found = yaml.safe_load(text)
        else:
            found = command_line(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(
            "the file cannot be read: {reason}",
            where=name,
            mend="mend it, or export it again",
            reason=(str(error).splitlines() or [type(error).__name__])[0],
        ) from error
    # YAML's keys may be no words (none at all, numbers, days); no program's settings are named so.
    return {str(name): value for name, value in found.items()} if isinstance(found, dict) else {}


def _data_of(document: Mapping[str, Any], path: Path, data: Path | None) -> dict[str, Any] | None:
    named = next(
        (value for key, value in document.items() if key.replace("-", "_") == "dataset_config"), None
    )
    if data is None and isinstance(named, str):
        places = (Path(named), path.parent / named, path.parent / Path(named).name)
        data = next((one for one in places if one.is_file()), None)
    if data is None:
        return None
    found = parse(read_text(data), str(data))
    if not musubi.is_data(found):
        raise UserError(
            "there are no [[datasets]] in it",
            where=str(data),
            mend="give the file that --dataset_config names",
        )
    return found


def _drop_refused(found: Imported) -> None:
    """Values that our schema refuses (a range, a combination) stay behind with its reason."""
    for _ in range(len(found.values)):
        try:
            load_config(None, base=found.values)
            return
        except UserError as error:
            each = error.errors if isinstance(error, UserErrors) else [error]
            wrong = [key for one in each if (key := _key_of(one.where, found.values)) is not None]
            if not wrong:
                raise
            for key, one in zip(wrong, each):
                value = found.values.pop(key, None)
                found.carried = [
                    pair for pair in found.carried if not pair[1].startswith(f"{key} =") and pair[1] != key
                ]
                found.leave(f"{key} = {value}", str(one).splitlines()[0])


def _key_of(where: str, values: Mapping[str, Any]) -> str | None:
    """The value that a message speaks of."""
    key = where.partition(" (")[0].strip("[]")
    fits = [one for one in values if key == one or key.startswith((f"{one}.", f"{one}["))]
    return max(fits, key=len) if fits else None
