"""Edit sets: which given pictures (conditions) belong to which target, told from file names.

`image1.jpg` in a condition folder belongs to the target `image1`, and so do `image1_1.jpg`, `image1_2.jpg`, ... in the order
of their numbers; a target that is really named `image1_1` wins over that reading. The conditions of a target come in the order
of the folders, as the config names them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whitetuner.data.folders import Listing, entries, fold, list_folder
from whitetuner.data.problems import NAMED, Problem
from whitetuner.errors import UserError

_NUMBERED = re.compile(r"^(.+)_([0-9]+)$")

#: Comes before every number: `image1.jpg` beside `image1_1.jpg`.
_PLAIN = -1


@dataclass(frozen=True)
class Pairing:
    """conditions: of every target; listings: of the condition folders that are there; problems: of names alone."""

    conditions: tuple[tuple[Path, ...], ...]
    listings: tuple[Listing, ...]
    problems: tuple[Problem, ...]


def pair(targets: Listing, folders: Sequence[Path], recursive: bool = False) -> Pairing:
    """Raises nothing: what does not match is among the problems. recursive: sub-folders are matched by name, too."""
    problems = _twice(targets.pictures, [stem_key(path, targets.folder) for path in targets.pictures])
    keys = {stem_key(path, targets.folder): index for index, path in enumerate(targets.pictures)}
    conditions: list[list[Path]] = [[] for _ in targets.pictures]
    lacking: list[tuple[Path, int]] = []
    listings = []
    seen = {targets.folder.resolve()}
    for folder in folders:
        if folder.resolve() in seen:
            problems.append(Problem("same folder", "error", folder, _again(folder)))
            continue
        seen.add(folder.resolve())
        try:
            listing = list_folder(folder, ".txt", recursive)
        except UserError as error:
            problems.append(Problem("folder", "error", folder, error))
            continue
        listings.append(listing)
        matched, orphans = _match(listing, keys)
        if not matched:
            problems.append(Problem("no match", "error", folder, _nothing_matches(listing, targets)))
            continue
        problems += [Problem("orphan condition", "warning", path, _orphan(path)) for path in orphans]
        problems += _twice([row[2] for row in matched], [row[:2] for row in matched])
        for index, _, path in sorted(matched, key=lambda row: (*row[:2], str(row[2]))):
            conditions[index].append(path)
        have = {index for index, _, _ in matched}
        lacking += [(folder, index) for index in range(len(conditions)) if index not in have]
    problems += [
        Problem("no condition", "error", path, _without(path, folders))
        for index, (path, own) in enumerate(zip(targets.pictures, conditions))
        if not own and keys[stem_key(path, targets.folder)] == index  # its twin is told above
    ]
    problems += [
        Problem(
            "fewer conditions", "warning", targets.pictures[index], _fewer(targets.pictures[index], folder)
        )
        for folder, index in lacking
        if conditions[index]
    ]
    return Pairing(tuple(map(tuple, conditions)), tuple(listings), tuple(problems))


def edit_layout(folder: Path) -> tuple[Path, tuple[Path, ...]] | None:
    """(target, conditions in natural order) of a folder with the sub-folders target*/ and condition*/; None for others."""
    inside = [entry.name for entry in entries(folder) if entry.is_dir()]
    targets = [name for name in inside if name.lower().startswith("target")]
    conditions = [name for name in inside if name.lower().startswith("condition")]
    if len(targets) != 1 or not conditions:
        return None
    return folder / targets[0], tuple(folder / name for name in sorted(conditions, key=_natural))


def _match(listing: Listing, keys: dict[str, int]) -> tuple[list[tuple[int, int, Path]], list[Path]]:
    """((target, number, picture) of those that belong to a target; the others)."""
    matched, orphans = [], []
    for path in listing.pictures:
        key = stem_key(path, listing.folder)
        numbered = _NUMBERED.match(key)
        if key in keys:
            matched.append((keys[key], _PLAIN, path))
        elif numbered and numbered[1] in keys:
            matched.append((keys[numbered[1]], int(numbered[2]), path))
        else:
            orphans.append(path)
    return matched, orphans


def stem_key(path: Path, folder: Path) -> str:
    """What files that belong together have in common: the path inside their folder, without ending, capitals folded."""
    return fold(path.relative_to(folder).with_suffix("").as_posix())


def _natural(name: str) -> list[tuple[int, str]]:
    """condition_10 after condition_2."""
    parts = re.split(r"([0-9]+)", fold(name))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _twice(paths: Sequence[Path], keys: Sequence[object]) -> list[Problem]:
    """Two files of one name up to the ending: which of them is meant cannot be told."""
    counts = Counter(keys)
    return [
        Problem(
            "same stem",
            "error",
            path,
            UserError(
                "several pictures have the same name up to the ending",
                where=str(path),
                mend="keep one of them; several given pictures of one target are named NAME_1, NAME_2, ...",
            ),
        )
        for path, key in zip(paths, keys)
        if counts[key] > 1
    ]


def _nothing_matches(listing: Listing, targets: Listing) -> UserError:
    names = [path.stem for path in listing.pictures[:NAMED]]
    wanted = [path.stem for path in targets.pictures[:NAMED]]
    if not names:
        return UserError(
            "no pictures in this condition folder",
            where=str(listing.folder),
            mend="put the given pictures there, named like their targets ({wanted}), or leave the folder out",
            wanted=", ".join(wanted),
        )
    return UserError(
        "none of its {count} pictures has the name of a target: {names} here, {wanted} in the target folder",
        where=str(listing.folder),
        mend="name given pictures like their target (NAME, or NAME_1, NAME_2, ... for several)",
        count=len(listing.pictures),
        names=", ".join(names),
        wanted=", ".join(wanted),
    )


def _again(folder: Path) -> UserError:
    return UserError(
        "the same folder is named twice: as target and condition, or as two conditions",
        where=str(folder),
        mend="name a folder of other pictures: from a target beside itself only copying is learned",
    )


def _orphan(path: Path) -> UserError:
    return UserError(
        "a given picture without a target of its name: it is left out",
        where=str(path),
        mend="name it like its target (NAME, or NAME_1, NAME_2, ... for several), or delete it",
    )


def _without(target: Path, folders: Sequence[Path]) -> UserError:
    return UserError(
        "this target has no given picture in {folders}",
        where=str(target),
        mend="add one of the same name (or NAME_1, NAME_2, ...), or take the target out",
        folders=", ".join(map(str, folders)) or "any condition folder",
    )


def _fewer(target: Path, folder: Path) -> UserError:
    return UserError(
        "no given picture of this name in {folder}: the target is learned with fewer",
        where=str(target),
        mend="fine if it is meant; else add it there",
        folder=folder,
    )
