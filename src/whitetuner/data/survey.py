"""Every picture and caption of all sets is looked at once: what is there, what its text is, what is wrong with it.

Everything wrong is found in one look and told together. Nothing is decoded here; `data/probe.py` reads headers and ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from whitetuner.data.captions import read_caption, tidy, with_trigger
from whitetuner.data.folders import Listing, kohya_folders, list_folder, not_a_folder, nothing_found
from whitetuner.data.masks import mask_fault, masks_of
from whitetuner.data.pairs import pair
from whitetuner.data.probe import Probe, probe
from whitetuner.data.problems import Problem
from whitetuner.data.set_options import SetOptions
from whitetuner.data.video import OTHER_VIDEOS, is_clip, look
from whitetuner.data.video_folders import list_videos, nothing_to_see
from whitetuner.errors import UserError


@dataclass(frozen=True)
class PictureSet:
    """One folder to learn from, as it was found (a kohya folder gives several of one SetOptions)."""

    name: str
    folder: Path
    options: SetOptions
    repeats: int
    weight: float | None
    caption_dropout: float


@dataclass(frozen=True)
class Found:
    """One picture as it was met: caption None where it has none that can be used; conditions: the pictures given for it; mask:
    the file that says what of it counts (itself, where its alpha channel does)."""

    path: Path
    set_index: int
    caption: str | None
    probe: Probe
    conditions: tuple[Path, ...] = ()
    condition_probes: tuple[Probe, ...] = ()
    mask: Path | None = None

    @property
    def readable(self) -> bool:
        """Whether the picture and all its conditions could be read."""
        return all(probe.size is not None for probe in (self.probe, *self.condition_probes))


@dataclass(frozen=True)
class Survey:
    """All pictures of all sets, good and bad, with every problem that could be seen without decoding."""

    sets: tuple[PictureSet, ...]
    found: tuple[Found, ...]
    problems: tuple[Problem, ...]


def caption_files(sections: Sequence[object]) -> list[Path]:
    """Every caption file of all sets. Raises UserError for a set whose folder is missing or empty."""
    listings = [listing for section in sections for listing, _, _ in _listings(SetOptions.of(section))]
    return [caption for listing in listings for caption in listing.captions if caption is not None]


def survey(
    sections: Sequence[object], deep: bool = False, progress: Callable[[int, int], None] | None = None
) -> Survey:
    """Looks at every picture and caption of all sets; raises nothing for single files.

    deep: decodes every picture; progress: told (pictures looked at, pictures in all)
    """
    sets: list[PictureSet] = []
    problems: list[Problem] = []
    jobs: list[tuple[int, Path, Path | None, tuple[Path, ...], Path | None]] = []
    given = [SetOptions.of(section) for section in sections]
    weighted = any(options.weight is not None for options in given)
    for options in given:
        try:
            listings = list(_listings(options))
        except UserError as error:
            problems.append(Problem("folder", "error", Path(options.source or ""), error))
            continue
        visits = sum(len(listing.pictures) * repeats for listing, repeats, _ in listings)
        for listing, repeats, words in listings:
            index = len(sets)
            own = options if words is None else replace(options, default_caption=words)
            weight = options.weight
            if weight is None and weighted:
                weight = 1.0
            if (
                weight is not None and visits
            ):  # the folders of one set share its weight, so that it counts as one
                weight *= len(listing.pictures) * repeats / visits
            sets.append(
                PictureSet(listing.folder.name, listing.folder, own, repeats, weight, options.caption_dropout)
            )
            problems += _listing_problems(listing, own)
            given_for: Sequence[tuple[Path, ...]] = [()] * len(listing.pictures)
            if options.target is not None:
                pairing = pair(listing, _folders(options.conditions), options.recursive)
                given_for = pairing.conditions
                problems += pairing.problems
                for other in pairing.listings:
                    problems += _unread_problems(other)
            masks, wrong = masks_of(listing, own)
            problems += wrong
            rows = zip(listing.pictures, listing.captions, given_for, masks, strict=True)
            jobs += [(index, *row) for row in rows]
    files = [(target, *rest, *(() if mask is None else (mask,))) for _, target, _, rest, mask in jobs]
    pictures = list(dict.fromkeys(path for row in files for path in row))
    probes: dict[Path, Probe] = {}
    with ThreadPoolExecutor() as pool:
        for path, looked in zip(pictures, pool.map(lambda path: _look(path, deep), pictures), strict=True):
            probes[path] = looked
            if looked.problem is not None:
                problems.append(looked.problem)
            if progress is not None:
                progress(len(probes), len(pictures))
        texts = list(pool.map(lambda job: _caption(job[2], sets[job[0]].options), jobs))
    found = []
    for (index, path, _, rest, mask), (caption, problem) in zip(jobs, texts, strict=True):
        fault = None if mask is None else mask_fault(path, probes[path], mask, probes[mask], deep)
        problems += [one for one in (problem, fault) if one is not None]
        given_probes = tuple(probes[one] for one in rest)
        found.append(Found(path, index, caption, probes[path], rest, given_probes, mask))
    return Survey(tuple(sets), tuple(found), tuple(problems))


def _look(path: Path, deep: bool) -> Probe:
    return look(path, deep) if is_clip(path) else probe(path, deep)


def _listings(options: SetOptions) -> list[tuple[Listing, int, str | None]]:
    """The folders of one set with their repeats, and the words of a kohya folder where they stand in for captions."""
    masks = [] if options.mask_dir is None else [options.mask_dir]
    if options.videos is not None:
        (folder,) = _folders([options.videos])
        videos = list_videos(folder, options.caption_ext, options.recursive)
        if not videos.pictures:
            raise nothing_to_see(folder)
        return [(videos, options.repeats, None)]
    if options.target is not None:
        (folder,) = _folders([options.target])
        apart = _folders([*options.conditions, *masks])
        targets = list_folder(folder, options.caption_ext, options.recursive, frozenset(apart))
        if not (targets.pictures or targets.misnamed):
            raise nothing_found(folder)
        return [(targets, options.repeats, None)]
    if options.images is None:
        raise UserError(
            "no folder of pictures is named",
            where="[data]",
            mend='set images = "FOLDER" (edit: target and conditions; video: videos) in [data] or in every [[data.sets]]',
        )
    (folder,) = _folders([options.images])
    if not folder.is_dir():
        raise not_a_folder(folder)
    inner = kohya_folders(folder)
    apart = [*(path for path, _, _ in inner), *_folders(masks)]
    rest = list_folder(folder, options.caption_ext, options.recursive, frozenset(apart))
    listings: list[tuple[Listing, int, str | None]] = (
        [(rest, options.repeats, None)] if rest.pictures or rest.misnamed else []
    )
    for path, count, words in inner:
        listing = list_folder(path, options.caption_ext, options.recursive)
        if listing.pictures or listing.misnamed:
            listings.append(
                (listing, options.repeats * count, words if options.default_caption is None else None)
            )
    if not listings:
        raise nothing_found(folder)
    return listings


def _folders(paths: Sequence[str | Path]) -> list[Path]:
    return [Path(path).expanduser() for path in paths]


def _unread_problems(listing: Listing) -> list[Problem]:
    """Pictures that are not learned from, told from their names."""
    problems = [
        Problem(
            "not read",
            "warning",
            path,
            UserError(
                "{kind} files are left out",
                where=str(path),
                mend="convert to mp4 (H.264)"
                if path.suffix.lower() in OTHER_VIDEOS
                else "convert to png, jpg or webp",
                kind=path.suffix.lower(),
            ),
        )
        for path in listing.unread
    ]
    problems += [
        Problem(
            "name",
            "error",
            path,
            UserError(
                "the file name is not UTF-8 (here as it is probably meant), as after unpacking a zip from Windows",
                where=str(path),
                mend="rename it, or unpack again with the right code page: unzip -O gbk, or 7z",
            ),
        )
        for path in listing.misnamed
    ]
    return problems


def _listing_problems(listing: Listing, options: SetOptions) -> list[Problem]:
    """What the names alone tell: kinds that are not read, two pictures with one caption, pictures with none."""
    problems = _unread_problems(listing)
    if options.prompt is None:
        problems += [
            Problem(
                "orphan caption",
                "note",
                path,
                UserError(
                    "a caption without a picture of its name",
                    where=str(path),
                    mend="rename it if it belongs to one",
                ),
            )
            for path in listing.orphans
        ]
    shared = Counter(caption for caption in listing.captions if caption is not None)
    if options.prompt is not None and shared:
        unused = UserError(
            "{count} caption files are not looked at: prompt is the text of the whole set",
            where=str(listing.folder),
            mend="leave prompt out to learn from the captions",
            count=len(shared),
        )
        problems.append(Problem("unused captions", "note", listing.folder, unused))
    for path, caption in zip(listing.pictures, listing.captions, strict=True):
        if options.prompt is not None:
            continue
        if caption is not None and shared[caption] > 1:
            error = UserError(
                "several pictures have the same name up to the ending, and share the caption {caption}",
                where=str(path),
                mend="rename one of them with a caption of its own, or delete it",
                caption=caption.name,
            )
            problems.append(Problem("same stem", "error", path, error))
        if caption is None and options.default_caption is None:
            problems.append(Problem("no caption", "error", path, _no_caption(path, listing, options)))
    return problems


def _no_caption(path: Path, listing: Listing, options: SetOptions) -> UserError:
    if listing.other_captions:
        return UserError(
            "no caption file ending in {ext} beside the picture, but there are some ending in {other}",
            where=str(path),
            mend='set caption_ext = "{other}"',
            ext=options.caption_ext,
            other=listing.other_captions.most_common(1)[0][0],
        )
    if options.videos is not None:
        return UserError(
            "no caption file (same name, ending in {ext}) beside the clip",
            where=str(path),
            mend='write one (of a frame folder also caption{ext} in it), or set default_caption = "..." ("": no text)',
            ext=options.caption_ext,
        )
    if options.target is not None:
        return UserError(
            "no caption file (same name, ending in {ext}) beside the target",
            where=str(path),
            mend='set prompt = "..." (one instruction for the whole set), or write a caption file for each target',
            ext=options.caption_ext,
        )
    return UserError(
        "no caption file (same name, ending in {ext}) beside the picture",
        where=str(path),
        mend='write one, or set default_caption = "..." for all that lack one ("" = learn without text)',
        ext=options.caption_ext,
    )


def _caption(beside: Path | None, options: SetOptions) -> tuple[str | None, Problem | None]:
    """The final text, or what is wrong with the file."""
    if options.prompt is not None:
        return with_trigger(tidy(options.prompt), options.trigger), None
    text, problem = "", None
    if beside is not None:
        try:
            text = read_caption(beside)
        except UserError as error:
            return None, Problem("encoding", "error", beside, error)
        except OSError as error:
            reason = UserError(
                "the caption cannot be read ({reason})",
                where=str(beside),
                mend="mend its rights",
                reason=error,
            )
            return None, Problem("caption", "error", beside, reason)
        if not text and not options.default_caption:
            level: Literal["warning", "note"] = "note" if options.trigger else "warning"
            empty = UserError(
                "the caption file is empty: the picture is learned without text",
                where=str(beside),
                mend="write what is to be seen, or set default_caption",
            )
            problem = Problem("empty caption", level, beside, empty)
    if not text:
        if beside is None and options.default_caption is None:
            return None, None  # told by the listing
        text = tidy(options.default_caption or "")
    return with_trigger(text, options.trigger), problem
