"""A hub name (ORG/MODEL) where a model folder is asked for: fetched once through huggingface_hub, then a folder like any other.

Only what a training reads is fetched: the components of the family, weights as safetensors, no second precision. What it
comes to is said before; a fetch that was cut goes on where it was. A mirror is named by the variable HF_ENDPOINT, the place of
the files by HF_HOME, as everywhere with that library. Checks and plans fetch nothing: they say what to do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from whitetuner.config.schema import Config
from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.families import registry
from whitetuner.family import FamilySpec
from whitetuner.models import SINGLE_PARTS, as_path
from whitetuner.runs.files import write_atomically
from whitetuner.single_files import fetched_note, is_hub_name

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

Say = Callable[[str], None]


def fetch_for(config: Config, say: Say) -> None:
    """Fetches the config's model where it names one by hub name that is not here yet. Raises UserError."""
    name = config.model.path
    if name is None or not is_hub_name(name) or as_path(name).exists():
        return
    spec = registry.spec(config.model.family)
    given = {part for part in SINGLE_PARTS if getattr(config.model, part)}
    fetch(name, spec, say, without=given)


def fetch(name: str, spec: FamilySpec, say: Say, without: Iterable[str] = ()) -> Path:
    """-> the folder with the model's files, whole. without: components that are given otherwise.

    Raises UserError (exit code 3 where the hub cannot be reached): no such model, one behind a licence page, no room on the
    disk, a connection that broke (what came stays, and the next try goes on).
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT") or None
    wanted = tuple(part for part in spec.components if part not in set(without))
    try:
        found = HfApi(endpoint=endpoint).model_info(name, files_metadata=True)
        sizes = {one.rfilename: int(one.size or 0) for one in found.siblings or ()}
        files = needed(sizes, wanted)
        if "model_index.json" not in files:
            raise UserError(
                "{name} is no model in diffusers layout: model_index.json is missing",
                where="model.path",
                mend="use one of: {known}",
                name=name,
                known=", ".join(sorted(set(spec.components.values()))),
            )
        total = sum(sizes[file] for file in files)
        _room(total, name)
        say(
            f"fetching {name}: {len(files)} files, {total / 1e9:.2f} GB (of {sum(sizes.values()) / 1e9:.2f} GB there)"
        )
        folder = Path(
            snapshot_download(
                name, revision=found.sha, allow_patterns=[_literal(f) for f in files], endpoint=endpoint
            )
        )
    except OfflineModeIsEnabled as error:
        raise _unreachable(name, "HF_HUB_OFFLINE is set") from error
    except GatedRepoError as error:
        raise UserError(
            "{name} is given only to who has agreed to its licence",
            where="model.path",
            mend="agree to it on the model's page, then log in here: hf auth login",
            code=EXIT_ENVIRONMENT,
            name=name,
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            "there is no model {name} on the hub",
            where="model.path",
            mend="look at its spelling; a folder is given with its path, e.g. ./{name}",
            name=name,
        ) from error
    except (HfHubHTTPError, _transport_errors(), OSError) as error:
        raise _unreachable(
            name, str(error).splitlines()[0] if str(error) else type(error).__name__
        ) from error
    short = [file for file in files if (folder / file).stat().st_size != sizes[file]]
    if short:
        raise _unreachable(name, f"{short[0]} came in another size than it has there")
    note = fetched_note(name)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        note, json.dumps({"folder": str(folder), "files": files, "revision": found.sha}, indent=1)
    )
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
        if file == "model_index.json" or (folder in folders and not unread):
            kept.append(file)
    return kept


def _transport_errors() -> type[Exception]:
    """What the library's HTTP client raises where nobody answers: of httpx in its first release, of httpx2 later."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError")


def _literal(file: str) -> str:
    """As a pattern that means this file alone."""
    return re.sub(r"([\[*?])", r"[\1]", file)


def _room(total: int, name: str) -> None:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    there = next(one for one in (place, *place.parents) if one.exists())
    here = place / f"models--{name.replace('/', '--')}" / "blobs"
    came = sum(one.stat().st_size for one in here.iterdir()) if here.is_dir() else 0
    free = shutil.disk_usage(there).free
    if free + came < total:
        raise UserError(
            "{name} needs {total:.1f} GB, and {place} has {free:.1f} GB left",
            where="model.path",
            mend="make room, or set HF_HOME to a folder on another disk",
            code=EXIT_ENVIRONMENT,
            name=name,
            total=total / 1e9,
            free=free / 1e9,
            place=there,
        )


def _unreachable(name: str, reason: str) -> UserError:
    return UserError(
        "{name} could not be fetched ({reason}); what came so far stays",
        where="model.path",
        mend="try again, it goes on where it was; a mirror: HF_ENDPOINT=https://hf-mirror.com; or give a folder",
        code=EXIT_ENVIRONMENT,
        name=name,
        reason=reason,
    )
