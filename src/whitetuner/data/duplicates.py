"""Files of equal content in one data set: learned more often than the others, usually by mistake."""

from __future__ import annotations

from pathlib import Path

from whitetuner.data.survey import Found, Survey
from whitetuner.data.video_folders import content_digests


def duplicates_of(looked: Survey) -> tuple[tuple[Path, ...], ...]:
    """Files of equal content within one set; only those of equal length are read. Equal targets of different given
    pictures are different things to learn.
    """
    lengths: dict[tuple[int, ...], list[Found]] = {}
    for found in looked.found:
        if found.readable:
            files = (found.path, *found.conditions)
            lengths.setdefault((found.set_index, *(_bytes(path) for path in files)), []).append(found)
    suspects = [found for group in lengths.values() if len(group) > 1 for found in group]
    paths = list(dict.fromkeys(path for one in suspects for path in (one.path, *one.conditions)))
    hashes = dict(zip(paths, content_digests(paths), strict=True))
    same: dict[tuple[int, tuple[str, ...]], list[Path]] = {}
    for one in suspects:
        content = tuple(hashes[path] for path in (one.path, *one.conditions))
        same.setdefault((one.set_index, content), []).append(one.path)
    return tuple(tuple(sorted(group)) for group in same.values() if len(group) > 1)


def _bytes(path: Path) -> int:
    return sum(one.stat().st_size for one in path.iterdir()) if path.is_dir() else path.stat().st_size
