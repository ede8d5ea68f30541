"""Masks: what of a picture counts in the loss, told by a second picture of the same name or by its own alpha channel.

A mask is scaled and cut by the same function as its picture, then to cells of 8 x 8 pixels, each the mean of its area; the
latents of all families are of such cells or of several (see data/mask_fields.py). The picture itself stays what it is
without a mask. No torch here: data sets are looked at without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from whitetuner.data.folders import Listing, list_folder
from whitetuner.data.media import cut, no_alpha, read_mask
from whitetuner.data.pairs import stem_key
from whitetuner.data.probe import Probe
from whitetuner.data.problems import NAMED, Problem
from whitetuner.data.set_options import SetOptions
from whitetuner.errors import UserError
from whitetuner.records import Size

#: Side in pixels of what one number of a kept mask stands for.
CELL_PX = 8


def mask_cells(path: Path, alpha: bool, size: Size, data: bytes | None = None) -> Image.Image:
    """The mask of a picture that is trained at `size`: greys of size / 8, 255 where all of a cell counts.

    Raises UserError for a file that cannot be read, and when nothing of it is white.
    """
    cells = cut(read_mask(path, alpha, data), size).reduce(CELL_PX)
    if not cells.getextrema()[1]:
        raise _nothing_counts(path)
    return cells


def masks_of(listing: Listing, options: SetOptions) -> tuple[Sequence[Path | None], list[Problem]]:
    """The mask file of every picture of a listing (the picture itself, by its alpha channel), and what is wrong by the names."""
    if options.mask_alpha:
        return listing.pictures, []
    if options.mask_dir is None:
        return [None] * len(listing.pictures), []
    folder = Path(options.mask_dir).expanduser()
    if (
        folder / listing.folder.name
    ).is_dir():  # kohya's sub-folders: theirs beside each other, as the pictures are
        folder = folder / listing.folder.name
    try:
        masks = list_folder(folder, ".txt", options.recursive)
    except UserError as error:
        return [None] * len(listing.pictures), [Problem("folder", "error", folder, error)]
    by_key: dict[str, Path] = {}
    problems = []
    for path in masks.pictures:
        key = stem_key(path, folder)
        if key in by_key:
            problems.append(Problem("same stem", "error", path, _twice(path)))
        by_key.setdefault(key, path)
    keys = [stem_key(path, listing.folder) for path in listing.pictures]
    if listing.pictures and not by_key.keys() & set(keys):
        wrong = _nothing_matches(folder, masks.pictures, listing.pictures)
        return [None] * len(keys), [Problem("no match", "error", folder, wrong)]
    problems += [
        Problem("no mask", "error", path, _without(path, folder))
        for path, key in zip(listing.pictures, keys, strict=True)
        if key not in by_key
    ]
    problems += [
        Problem("orphan mask", "warning", path, _orphan(path))
        for key, path in by_key.items()
        if key not in set(keys)
    ]
    return [by_key.get(key) for key in keys], problems


def mask_fault(path: Path, seen: Probe, mask: Path, seen_mask: Probe, deep: bool) -> Problem | None:
    """What is wrong with the mask of a picture by their headers; deep: by its pixels, too."""
    if seen.size is None or seen_mask.size is None:
        return None  # told already
    alpha = mask == path
    if alpha and "transparent" not in seen.traits:
        return Problem("no alpha", "error", path, no_alpha(path))
    (width, height, _), (mask_width, mask_height, _) = seen.size, seen_mask.size
    # Of one shape: scaled to cover the picture it is as large but for the rounding of its own sides.
    scale = max(width / mask_width, height / mask_height)
    most = max(1.0, min(scale, 0.02 * max(width, height)))
    if mask_width * scale - width > most or mask_height * scale - height > most:
        error = UserError(
            "the mask has {mask_width} x {mask_height} pixels, its picture {width} x {height}: not of one shape",
            where=str(mask),
            mend="make the mask as large as the picture, upright as it is seen, or smaller in proportion",
            mask_width=mask_width,
            mask_height=mask_height,
            width=width,
            height=height,
        )
        return Problem("mask shape", "error", path, error)
    if deep and not read_mask(mask, alpha).getextrema()[1]:
        return Problem("black mask", "error", path, _nothing_counts(mask))
    return None


def _nothing_counts(path: Path) -> UserError:
    return UserError(
        "nothing of the mask is white (or opaque) in what is learned of its picture",
        where=str(path),
        mend="paint white what counts, or take the picture out of the set",
    )


def _without(path: Path, folder: Path) -> UserError:
    return UserError(
        "this picture has no mask of its name in {folder}",
        where=str(path),
        mend="add one (all white where the whole picture counts), or put the picture into a set without masks",
        folder=folder,
    )


def _twice(path: Path) -> UserError:
    return UserError(
        "several masks have the same name up to the ending", where=str(path), mend="keep one of them"
    )


def _orphan(path: Path) -> UserError:
    return UserError(
        "a mask without a picture of its name: it is left out",
        where=str(path),
        mend="name it like its picture, or delete it",
    )


def _nothing_matches(folder: Path, masks: Sequence[Path], pictures: Sequence[Path]) -> UserError:
    wanted = ", ".join(path.stem for path in pictures[:NAMED])
    if not masks:
        return UserError(
            "no pictures in this folder of masks",
            where=str(folder),
            mend="put the masks there, named like their pictures ({wanted}), or take mask_dir out",
            wanted=wanted,
        )
    return UserError(
        "none of its {count} masks has the name of a picture: {names} here, {wanted} among the pictures",
        where=str(folder),
        mend="name each mask like its picture, whatever the ending (cat.jpg: cat.png)",
        count=len(masks),
        names=", ".join(path.stem for path in masks[:NAMED]),
        wanted=wanted,
    )
