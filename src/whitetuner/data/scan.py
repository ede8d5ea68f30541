"""Folders of pictures with captions -> Items: what is learned from, at which size, under which name."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from whitetuner.data.buckets import bucketing, choose
from whitetuner.data.digests import digests
from whitetuner.data.problems import Problem, merged, refuse
from whitetuner.data.survey import Found, PictureSet, SetOptions, caption_files, survey
from whitetuner.errors import UserError
from whitetuner.records import Item, Size

__all__ = ["PictureSet", "Scan", "SetOptions", "caption_files", "place", "scan"]


@dataclass(frozen=True)
class Scan:
    """items: in scan order; sets: `Item.set_index` counts them; problems: warnings and notes, nothing that stops a run."""

    items: tuple[Item, ...]
    sets: tuple[PictureSet, ...]
    problems: tuple[Problem, ...]

    def notes(self) -> list[str]:
        """The problems as few messages: those that read alike name their first files and count the rest."""
        return [str(error) for error in merged(self.problems)]

    def digest(self) -> str:
        """Changes when a picture, a caption, a size or the make-up of the sets does; not when files are renamed."""
        rows = sorted([item.id, item.caption, list(item.size), item.set_index] for item in self.items)
        sets = [[one.repeats, one.weight, one.caption_dropout] for one in self.sets]
        return hashlib.blake2b(json.dumps([rows, sets]).encode(), digest_size=16).hexdigest()


def scan(
    sections: Sequence[object],
    stride_px: int,
    *,
    min_size_px: int = 64,
    index_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Items of all sets, in an order that is the same on every machine.

    sections: objects with the fields of SetOptions; index_folder: where content hashes are remembered;
    progress: told (files hashed, files to hash)
    Raises UserErrors with everything that must be mended first.
    """
    looked = survey(sections)
    problems = list(looked.problems)
    sized: list[tuple[Found, Size]] = []
    for found in looked.found:
        size, problem = place(found, looked.sets[found.set_index], stride_px, min_size_px)
        if problem is not None:
            problems.append(problem)
        if size is not None:
            sized.append((found, size))
    folder = looked.sets[0].folder if len({one.folder for one in looked.sets}) == 1 else None
    refuse(problems, folder)
    hashes = digests([found.path for found, _ in sized], index_folder, progress=progress)
    seen: Counter[str] = Counter()
    items = []
    for (found, size), digest in zip(sized, hashes, strict=True):
        assert found.caption is not None and found.probe.size is not None, "refused above"
        items.append(
            Item(
                f"{digest}-{seen[digest]}",
                found.path,
                digest,
                found.caption,
                found.probe.size,
                size,
                set_index=found.set_index,
            )
        )
        seen[digest] += 1
    return Scan(tuple(items), looked.sets, tuple(problem for problem in problems if problem.level != "error"))


def place(
    found: Found, of: PictureSet, stride_px: int, min_size_px: int
) -> tuple[Size | None, Problem | None]:
    """The size a picture is trained at, or what is wrong with its size. (None, None): it could not be read at all."""
    if found.probe.size is None:
        return None, None
    options = of.options
    rules = bucketing(options.resolution, stride_px, min_size_px, options.upscale)
    size = choose(found.probe.size, rules)
    if size is not None:
        return size, None
    width, height, _ = found.probe.size
    skip = options.too_small == "skip"
    error = UserError(
        "{width} x {height} pixels are too few: no side may be under {shortest}",
        where=str(found.path),
        mend='take a larger one, set upscale = true to enlarge it, or too_small = "skip" to leave it out',
        width=width,
        height=height,
        shortest=rules.shortest_px,
    )
    return None, Problem("too small", "warning" if skip else "error", found.path, error)
