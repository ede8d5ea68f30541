"""Which files and folders of a video set are clips, which text belongs to each, and the digest of each one's content."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from whitetuner.data.captions import CAPTION_ENDINGS
from whitetuner.data.digests import digests
from whitetuner.data.folders import CACHE_TAG, Listing, entries, fold, not_a_folder
from whitetuner.data.media import PICTURES
from whitetuner.data.video import OTHER_VIDEOS, VIDEOS, frame_files
from whitetuner.errors import UserError


def list_videos(folder: Path, caption_ext: str, recursive: bool) -> Listing:
    """Video files, and folders of pictures as clips. Captions: of the same name beside; of a frame folder also caption.txt
    inside. A folder that holds nothing but frames is one clip itself.

    Raises UserError when the folder is missing or a file.
    """
    if not folder.is_dir():
        raise not_a_folder(folder)
    ext = caption_ext if caption_ext.startswith(".") else f".{caption_ext}"
    clips: list[Path] = []
    captions: list[Path | None] = []
    unread: list[Path] = []
    orphans: list[Path] = []
    endings: Counter[str] = Counter()
    places = [folder]
    while places:
        place = places.pop(0)
        here = entries(place)
        names = sorted((one.name for one in here if one.is_file()), key=lambda name: (fold(name), name))
        inner = sorted((one.name for one in here if one.is_dir()), key=lambda name: (fold(name), name))
        folded = {fold(name): name for name in names}
        used: set[str | None] = set()
        films = [name for name in names if Path(name).suffix.lower() in VIDEOS]
        folders = [name for name in inner if _holds_frames(place / name)]
        if place == folder and not films and not folders and _holds_frames(folder):
            return Listing(folder, (folder,), (_inside(folder, ext),), (), (), (), endings)
        for name in films:
            stem = Path(name).stem
            beside = folded.get(fold(stem + ext))
            used.add(beside)
            clips.append(place / name)
            captions.append(place / beside if beside else None)
            if beside is None:
                endings.update(one for one in CAPTION_ENDINGS if fold(stem + one) in folded)
        for name in folders:
            beside = folded.get(fold(name + ext))
            used.add(beside)
            clips.append(place / name)
            captions.append(place / beside if beside else _inside(place / name, ext))
        unread += [place / name for name in names if Path(name).suffix.lower() in OTHER_VIDEOS]
        orphans += [place / name for name in names if fold(name).endswith(fold(ext)) and name not in used]
        if recursive:
            places += [
                place / name
                for name in inner
                if name not in folders
                and not (place / name / CACHE_TAG).exists()
                and not (place / name / "events.jsonl").exists()
            ]
    return Listing(folder, tuple(clips), tuple(captions), tuple(unread), tuple(orphans), (), endings)


def holds_videos(folder: Path) -> bool:
    """Whether a folder has video files (not whether they can be read)."""
    return folder.is_dir() and any(Path(one.name).suffix.lower() in VIDEOS for one in entries(folder))


def nothing_to_see(folder: Path) -> UserError:
    """What to say of a folder without a single clip."""
    kinds = Counter(Path(one.name).suffix.lower() or "without ending" for one in entries(folder))
    have = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "nothing"
    return UserError(
        "no videos (it holds: {have})",
        where=str(folder),
        mend="put {endings} files there, or folders of numbered pictures; or set recursive = true",
        have=have,
        endings=", ".join(VIDEOS),
    )


def content_digests(
    paths: Sequence[Path],
    index_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """As digests.digests; a frame folder's is that of its frames in their order."""
    files = {path: frame_files(path) if path.is_dir() else [path] for path in paths}
    flat = list(dict.fromkeys(file for group in files.values() for file in group))
    known = dict(zip(flat, digests(flat, index_folder, progress=progress), strict=True))
    found = []
    for path in paths:
        if path.is_dir():
            joined = "|".join(known[file] for file in files[path])
            found.append(hashlib.blake2b(joined.encode(), digest_size=16).hexdigest())
        else:
            found.append(known[path])
    return found


def _holds_frames(folder: Path) -> bool:
    return any(Path(one.name).suffix.lower() in PICTURES for one in entries(folder) if one.is_file())


def _inside(folder: Path, ext: str) -> Path | None:
    file = folder / f"caption{ext}"
    return file if file.is_file() else None
