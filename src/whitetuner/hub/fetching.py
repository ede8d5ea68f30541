"""A hub name (ORG/MODEL) where a model folder is asked for: fetched once, then a folder like any other.

Only what a training reads is fetched: the components of the family, weights as safetensors, no second precision. What it
comes to is said before; a fetch that was cut goes on where it was. Which hub: whitetuner.hub_names; mirrors and places of the
files: variables of the hubs' own (HF_ENDPOINT, HF_HOME; MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE). Checks and plans fetch nothing:
they say what to do.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from whitetuner.config.schema import Config
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.families import registry
from whitetuner.family import FamilySpec
from whitetuner.hub.source import Hub, NoSuchModelError, NotAllowedError, Say, UnreachableError, one_line
from whitetuner.hub_names import HubName, hub_name
from whitetuner.models import SINGLE_PARTS, as_path
from whitetuner.runs.files import write_atomically
from whitetuner.single_files import fetched, fetched_note

#: Never read: other frameworks, pickles, other precisions beside the plain files.
_UNREAD = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.gguf",
    "*.md",
    "*.png",
    "*.jpg",
)
_SECOND = re.compile(
    r"\.(fp16|bf16|fp32|fp8|ema|non_ema)[.-].*(safetensors|json)|\.index\.(fp16|bf16|fp32|fp8)\.json"
)


def fetch_for(config: Config, say: Say) -> None:
    """Fetches the config's model where it names one by hub name that is not here yet. Raises UserError."""
    path = config.model.path
    if path is None or as_path(path).exists():
        return
    name = hub_name(path)
    if name is None:
        return
    spec = registry.spec(config.model.family)
    given = {part for part in SINGLE_PARTS if getattr(config.model, part)}
    here = fetched(name)
    if here is None or not here.parts >= set(spec.components) - given:
        fetch(name, spec, say, without=given)


def fetch_named(path: str, family: str | None, say: Say) -> Path:
    """The same for who only has a name. family: None: told from the name. Raises UserError."""
    name = hub_name(path)
    if name is None:
        raise UserError(
            "{name} names no model of a hub",
            where="ORG/MODEL",
            mend="give ORG/MODEL, or modelscope:ORG/MODEL",
            name=path,
        )
    return fetch(name, registry.spec(family or family_of(name.name)), say)


def fetch(name: HubName, spec: FamilySpec, say: Say, without: Iterable[str] = ()) -> Path:
    """-> the folder with the model's files, whole and as they are there now. without: components that are given otherwise.

    Raises UserError (exit code 3 where the hub cannot be reached): no such model, one behind a licence page, no room on the
    disk, a connection that broke (what came stays, and the next try goes on).
    """
    hub = _hub(name.hub)
    wanted = tuple(part for part in spec.components if part not in set(without))
    try:
        found = hub.listing(name.name)
        files = needed(found.sizes, wanted)
        if "model_index.json" not in files:
            raise UserError(
                "{name} is no model in diffusers layout: model_index.json is missing",
                where="model.path",
                mend="use one of: {known}",
                name=name,
                known=", ".join(sorted(set(spec.components.values()))),
            )
        total = sum(found.sizes[file] for file in files)
        _room(hub, total, name)
        say(
            f"fetching {name}: {len(files)} files, {total / 1e9:.2f} GB (of {sum(found.sizes.values()) / 1e9:.2f} GB there)"
        )
        folder = hub.get(name.name, found, files, say)
    except NotAllowedError as error:
        raise UserError(
            "{name} is given only to who is logged in, or has agreed to its licence",
            where="model.path",
            mend="agree to it on the model's page, then log in here: {login}",
            code=EXIT_ENVIRONMENT,
            name=name,
            login=hub.login,
        ) from error
    except NoSuchModelError as error:
        raise UserError(
            "there is no model {name} on the hub",
            where="model.path",
            mend="look at its spelling; a folder is given with its path, e.g. ./{name}; another hub: {other}",
            name=name,
            other=_other(name),
        ) from error
    except (UnreachableError, OSError) as error:
        raise _unreachable(name, hub, one_line(error)) from error
    short = [file for file in files if (folder / file).stat().st_size != found.sizes[file]]
    if short:
        raise _unreachable(name, hub, f"{short[0]} came in another size than it has there")
    note = fetched_note(name)
    note.parent.mkdir(parents=True, exist_ok=True)
    document = {"folder": str(folder), "files": files, "parts": wanted, "revision": found.revision}
    write_atomically(note, json.dumps(document, indent=1))
    say(f"fetched into {folder}")
    return folder


def family_of(name: str) -> str:
    """The family whose released models are of this name, or are called alike. Raises UserError."""
    found = []
    for family in registry.FAMILIES:
        word = re.sub(r"[^a-z0-9]", "", family.removesuffix("-v2"))
        if word in re.sub(r"[^a-z0-9]", "", name.lower()):
            found.append(family)
    if "zimage" in found:
        found = [one for one in found if one != "zimage-v2"]
    if len(found) == 1:
        return found[0]
    raise UserError(
        "the name does not tell which family {name} is of",
        where="--family",
        mend="add --family; known: {known}",
        name=name,
        known=", ".join(registry.FAMILIES),
    )


def needed(sizes: Mapping[str, int], components: Iterable[str]) -> list[str]:
    """The files of a repository that a training reads. sizes: file -> bytes; components: folders of the diffusers layout."""
    folders = set(components)
    kept = []
    for file in sorted(sizes):
        folder, _, name = file.rpartition("/")
        unread = any(fnmatchcase(name.lower(), pattern) for pattern in _UNREAD) or _SECOND.search(name)
        plain = name not in ("", ".", "..") and not set(name) & set("\\:")
        if file == "model_index.json" or (folder in folders and plain and not unread):
            kept.append(file)
    return kept


def _hub(hub: str) -> Hub:
    if hub == "modelscope":
        from whitetuner.hub.modelscope import ModelScope

        return ModelScope()
    from whitetuner.hub.huggingface import HuggingFace

    return HuggingFace()


def _other(name: HubName) -> str:
    """The same name on the other hub, as a config says it."""
    return f"{'modelscope' if name.hub == 'huggingface' else 'huggingface'}:{name.name}"


def _room(hub: Hub, total: int, name: HubName) -> None:
    place = hub.place()
    there = next(one for one in (place, *place.parents) if one.exists())
    free = shutil.disk_usage(there).free
    if free + hub.came(name.name) < total:
        raise UserError(
            "{name} needs {total:.1f} GB, and {place} has {free:.1f} GB left",
            where="model.path",
            mend="make room, or set {variable} to a folder on another disk",
            code=EXIT_ENVIRONMENT,
            name=name,
            total=total / 1e9,
            free=free / 1e9,
            place=there,
            variable=hub.home,
        )


def _unreachable(name: HubName, hub: Hub, reason: str) -> UserError:
    return UserError(
        "{name} could not be fetched ({reason}); what came so far stays",
        where="model.path",
        mend="try again, it goes on where it was; a mirror: {mirror}; another hub: {other}; or give a folder",
        code=EXIT_ENVIRONMENT,
        name=name,
        reason=reason,
        mirror=hub.mirror,
        other=_other(name),
    )
