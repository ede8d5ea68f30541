"""Which files of a folder are pictures to learn from, which text belongs to each, and what is passed over."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from whitetuner.data.captions import CAPTION_ENDINGS
from whitetuner.data.media import OTHER_PICTURES, PICTURES
from whitetuner.errors import UserError

#: kohya's convention: a sub-folder "10_sks dog" is learned ten times an epoch, "sks dog" where a caption is missing.
_KOHYA = re.compile(r"^(\d+)_(.+)$")

#: Written into every cache folder (bford.info/cachedir); a folder with it is nobody's data set.
CACHE_TAG = "CACHEDIR.TAG"


@dataclass(frozen=True)
class Listing:
    """Pictures of one folder (its sub-folders too, if asked), in an order that no machine changes.

    captions: one text file each, or None; unread: pictures of kinds that are not read; orphans: captions without
    picture; misnamed: pictures whose names are not UTF-8, as they are probably meant
    """

    folder: Path
    pictures: tuple[Path, ...]
    captions: tuple[Path | None, ...]
    unread: tuple[Path, ...]
    orphans: tuple[Path, ...]
    misnamed: tuple[Path, ...]
    other_captions: Counter[str]


def kohya_folders(folder: Path) -> list[tuple[Path, int, str]]:
    """Sub-folders named COUNT_WORDS: (folder, count, words); empty when there are none."""
    found = []
    for name in sorted(entry.name for entry in entries(folder) if entry.is_dir()):
        match = _KOHYA.match(name)
        if match and int(match[1]) > 0 and not _passed_over(folder / name):
            found.append((folder / name, int(match[1]), match[2]))
    return found


def list_folder(
    folder: Path, caption_ext: str, recursive: bool, leave_out: frozenset[Path] = frozenset()
) -> Listing:
    """Raises UserError when the folder is missing or a file. Hidden files and what this program wrote are passed over."""
    if not folder.is_dir():
        raise not_a_folder(folder)
    ext = caption_ext if caption_ext.startswith(".") else f".{caption_ext}"
    pictures: list[Path] = []
    captions: list[Path | None] = []
    unread: list[Path] = []
    orphans: list[Path] = []
    misnamed: list[Path] = []
    endings: Counter[str] = Counter()
    for place, names in _walk(folder, recursive, leave_out):
        broken = {name for name in names if not _is_text(str(place / name))}
        misnamed += [_meant(place / name) for name in sorted(broken) if Path(name).suffix.lower() in PICTURES]
        names = [name for name in names if name not in broken]
        exact = set(names)
        folded: dict[str, list[str]] = {}
        for name in names:
            folded.setdefault(fold(name), []).append(name)
        used = set()
        for name in names:
            stem, ending = Path(name).stem, Path(name).suffix
            if ending.lower() in OTHER_PICTURES:
                unread.append(place / name)
            if ending.lower() not in PICTURES:
                continue
            beside = stem + ext if stem + ext in exact else next(iter(folded.get(fold(stem + ext), ())), None)
            pictures.append(place / name)
            captions.append(place / beside if beside else None)
            used.add(beside)
            if beside is None:
                endings.update(other for other in CAPTION_ENDINGS if stem + other in exact)
        orphans += [place / name for name in names if fold(name).endswith(fold(ext)) and name not in used]
    return Listing(
        folder, tuple(pictures), tuple(captions), tuple(unread), tuple(orphans), tuple(misnamed), endings
    )


def fold(name: str) -> str:
    """Names that differ only in capitals, or in how an accent is stored (macOS takes it apart), fold to the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _is_text(name: str) -> bool:
    """Linux keeps names as bytes: a zip made on a Chinese Windows leaves GBK, which nothing can print."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _meant(path: Path) -> Path:
    """The path with the parts that are no text read as Chinese Windows would."""
    return Path(
        *(part if _is_text(part) else os.fsencode(part).decode("gb18030", "replace") for part in path.parts)
    )


def not_a_folder(folder: Path) -> UserError:
    """What is told of a path that is no folder, with the nearest folder that is there."""
    if folder.exists():
        return UserError(
            "a file, not a folder", where=str(folder), mend="name the folder that holds the pictures"
        )
    parent = next((one for one in folder.parents if one.is_dir()), None)
    return UserError(
        "there is no such folder ({parent} exists)",
        where=str(folder),
        mend="mend the path of the data set",
        parent=parent,
    )


def nothing_found(folder: Path) -> UserError:
    """What to say of a folder without a single picture: what is there instead, and where pictures might be meant."""
    names = [entry.name for entry in entries(folder) if entry.is_file()]
    names.sort()
    kinds = Counter(Path(name).suffix.lower() or "without ending" for name in names)
    have = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "nothing"
    inside = [entry.name for entry in entries(folder) if entry.is_dir() and _holds_pictures(Path(entry.path))]
    if inside:
        return UserError(
            "no pictures (it holds: {have}), but its sub-folders have some: {inside}",
            where=str(folder),
            mend="set recursive = true, or name one of the sub-folders",
            have=have,
            inside=", ".join(sorted(inside)[:5]),
        )
    return UserError(
        "no pictures (it holds: {have})",
        where=str(folder),
        mend="put .jpg, .png, .webp or .bmp files there, or name another folder",
        have=have,
    )


def _holds_pictures(folder: Path) -> bool:
    return any(Path(entry.name).suffix.lower() in PICTURES for entry in entries(folder))


def _walk(
    folder: Path, recursive: bool, leave_out: frozenset[Path], above: tuple[Path, ...] = ()
) -> Iterator[tuple[Path, list[str]]]:
    real = folder.resolve()
    if real in above:  # a link to a folder that it lies in
        return
    here = entries(folder)
    yield (
        folder,
        sorted((entry.name for entry in here if entry.is_file()), key=lambda name: (fold(name), name)),
    )
    if recursive:
        inner = sorted((entry.name for entry in here if entry.is_dir()), key=lambda name: (fold(name), name))
        for name in inner:
            if folder / name not in leave_out and not _passed_over(folder / name):
                yield from _walk(folder / name, True, leave_out, (*above, real))


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, hidden names left out. Raises UserError when it may not be read."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except PermissionError as error:
        raise UserError(
            "the folder may not be read",
            where=str(folder),
            mend="give yourself the right to read it ({reason})",
            reason=error,
        ) from error


def _passed_over(folder: Path) -> bool:
    """Caches (ours and others') and folders of runs."""
    return (folder / CACHE_TAG).exists() or (folder / "events.jsonl").exists()
