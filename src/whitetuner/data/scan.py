"""Folders of pictures with captions -> Items: what is learned from, at which size, under which name."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from whitetuner.data.buckets import bucketing, choose, fit
from whitetuner.data.problems import Problem, merged, refuse
from whitetuner.data.set_options import SetOptions
from whitetuner.data.survey import Found, PictureSet, caption_files, survey
from whitetuner.data.tags import orders_of
from whitetuner.data.video_clips import ClipRules, Clips, choose_clips, clip_lengths, too_short
from whitetuner.data.video_folders import content_digests
from whitetuner.errors import UserError
from whitetuner.records import Item, Mask, Size

__all__ = ["PictureSet", "Scan", "SetOptions", "caption_files", "place", "place_conditions", "scan"]


@dataclass(frozen=True)
class Films:
    """What a model wants of videos: clips of `step` n + 1 frames (0: it takes none), `fps` a second, so many where the data set
    does not say; first_frame: whether it is given a clip's first frame (i2v).
    """

    step: int = 0
    fps: float = 16.0
    num_frames: int = 81
    first_frame: bool = False

    def rules(self, options: SetOptions) -> ClipRules:
        """Raises UserError for a length that this model does not have."""
        return ClipRules(
            lengths=clip_lengths(
                options.num_frames if not isinstance(options.num_frames, tuple) else list(options.num_frames),
                self.num_frames,
                self.step or 4,
            ),
            fps=options.fps or self.fps,
            choice=options.clips,
            count=options.clips_per_video,
            too_short=options.too_short,
            source_fps=options.frames_fps,
        )


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
        rows = sorted(
            [item.id, item.caption, list(item.size), item.set_index, *_given(item)] for item in self.items
        )
        sets = [[one.repeats, one.weight, one.caption_dropout, *_set_apart(one.options)] for one in self.sets]
        return hashlib.blake2b(json.dumps([rows, sets]).encode(), digest_size=16).hexdigest()


def scan(
    sections: Sequence[object],
    stride_px: int,
    *,
    min_size_px: int = 64,
    most_conditions: int | None = None,
    index_folder: Path | None = None,
    films: Films = Films(),
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Items of all sets, in an order that is the same on every machine.

    sections: objects with the fields of SetOptions; most_conditions: that the model takes, None: any number;
    films: what it wants of videos; index_folder: where content hashes are remembered
    progress: told (files hashed, files to hash)
    Raises UserErrors with everything that must be mended first.
    """
    looked = survey(sections)
    problems = list(looked.problems)
    sized: list[tuple[Found, Size, tuple[Size, ...]]] = []
    for found in looked.found:
        of = looked.sets[found.set_index]
        size, problem = place(found, of, stride_px, min_size_px)
        conditions, wrong = place_conditions(found, of, stride_px, most_conditions)
        problems += [*([problem] if problem is not None else []), *wrong]
        if size is not None and conditions is not None:
            sized.append((found, size, conditions))
    folder = looked.sets[0].folder if len({one.folder for one in looked.sets}) == 1 else None
    refuse(problems, folder)
    paths = list(
        dict.fromkeys(
            path
            for found, _, _ in sized
            for path in (found.path, *found.conditions, found.mask or found.path)
        )
    )
    hashes = dict(zip(paths, content_digests(paths, index_folder, progress=progress), strict=True))
    seen: Counter[str] = Counter()
    items: list[Item] = []
    for found, size, conditions in sized:
        assert found.caption is not None and found.probe.size is not None, "refused above"
        digest = hashes[found.path]
        if found.probe.times:
            clips, problem = clips_of(found, looked.sets[found.set_index], films, digest)
            problems += [] if problem is None else [problem]
            options = looked.sets[found.set_index].options
            for of_visit in () if clips is None else by_item(clips, looked.sets[found.set_index].options):
                one = _clip_item(found, digest, seen[digest], size, of_visit, films)
                items.append(replace(one, loss_weight=options.loss_weight, orders=_orders(found, options)))
                seen[digest] += 1
            continue
        items.append(
            Item(
                f"{digest}-{seen[digest]}",
                found.path,
                digest,
                found.caption,
                found.probe.size,
                size,
                found.conditions,
                tuple(hashes[path] for path in found.conditions),
                conditions,
                set_index=found.set_index,
                loss_weight=looked.sets[found.set_index].options.loss_weight,
                mask=_mask(found, looked.sets[found.set_index].options, hashes),
                orders=_orders(found, looked.sets[found.set_index].options),
            )
        )
        seen[digest] += 1
    refuse(problems, folder)
    if not items:
        raise UserError(
            "no video of the data set is long enough",
            where=str(folder or "data"),
            mend='lower data.num_frames, or set data.too_short = "pad" to hold the last frame of short ones',
        )
    return Scan(tuple(items), looked.sets, tuple(problem for problem in problems if problem.level != "error"))


def _orders(found: Found, options: SetOptions) -> tuple[str, ...]:
    return orders_of(found.caption or "", options.caption_shuffles, options.caption_keep)


def _mask(found: Found, options: SetOptions, hashes: Mapping[Path, str]) -> Mask | None:
    if found.mask is None:
        return None
    return Mask(found.mask, hashes[found.mask], options.mask_alpha, options.mask_floor)


def clips_of(found: Found, of: PictureSet, films: Films, digest: str) -> tuple[Clips | None, Problem | None]:
    """The clips of one video, or why there are none."""
    try:
        rules = films.rules(of.options)
    except UserError as error:
        return None, Problem("num_frames", "error", of.folder, error)
    times, folder = found.probe.times, found.probe.kind == "frames"
    clips = choose_clips(times, rules, digest, frames=folder)
    if clips is not None:
        return clips, None
    have = choose_clips(times, replace(rules, lengths=(1,), choice="head"), digest, frames=folder)
    assert have is not None, "one frame is always there"
    return None, too_short(found.path, have.at_rate, rules)


def by_item(clips: Clips, options: SetOptions) -> list[tuple[tuple[int, ...], ...]]:
    """One item for each clip; of clips at random one item, whose visits take them in turn."""
    return [clips.clips] if options.clips == "random" else [(clip,) for clip in clips.clips]


def _clip_item(
    found: Found, digest: str, ordinal: int, size: Size, clips: tuple[tuple[int, ...], ...], films: Films
) -> Item:
    assert found.caption is not None and found.probe.size is not None, "refused before"
    return Item(
        f"{digest}-{ordinal}",
        found.path,
        digest,
        found.caption,
        found.probe.size,
        size._replace(frames=len(clips[0])),
        condition_sizes=(size._replace(frames=1),) if films.first_frame else (),
        set_index=found.set_index,
        clips=clips,
    )


def place(
    found: Found, of: PictureSet, stride_px: int, min_size_px: int
) -> tuple[Size | None, Problem | None]:
    """The size a picture is trained at, or what is wrong with its size. (None, None): it could not be read at all."""
    if found.probe.size is None:
        return None, None
    options = of.options
    rules = bucketing(options.resolution, stride_px, min_size_px, options.upscale)
    size = choose(found.probe.size._replace(frames=1), rules)
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


def place_conditions(
    found: Found, of: PictureSet, stride_px: int, most: int | None = None
) -> tuple[tuple[Size, ...] | None, list[Problem]]:
    """The sizes the given pictures are read at, and what is wrong with them. None: one of them cannot be used.

    most: given pictures that the model takes; None: any number
    """
    if most is not None and len(found.conditions) > most:
        many = UserError(
            "{count} given pictures of one target, but this model takes at most {most}",
            where=str(found.path),
            mend="name fewer condition folders (or suffixed pictures), or take a model for several",
            count=len(found.conditions),
            most=most,
        )
        return None, [Problem("too many conditions", "error", found.path, many)]
    sizes: list[Size] = []
    problems = []
    skip = of.options.too_small == "skip"
    for path, probe in zip(found.conditions, found.condition_probes, strict=True):
        if probe.size is None:
            continue
        size = fit(probe.size, of.options.reference_resolution, stride_px, of.options.upscale)
        if size is not None:
            sizes.append(size)
            continue
        error = UserError(
            "{width} x {height} pixels are too few for a given picture: no side may come out under {stride}",
            where=str(path),
            mend="take a larger one, or one of a less extreme shape; its target is left out meanwhile"
            if skip
            else 'take a larger one, one of a less extreme shape, or set too_small = "skip" to leave its target out',
            width=probe.size.width,
            height=probe.size.height,
            stride=stride_px,
        )
        problems.append(Problem("too small", "warning" if skip else "error", path, error))
    return (tuple(sizes) if len(sizes) == len(found.conditions) else None), problems


def _set_apart(options: SetOptions) -> list[object]:
    """What a set says besides; nothing where it says nothing, so that digests of runs begun before stay what they were."""
    return [] if options.loss_weight == 1.0 else [{"loss_weight": options.loss_weight}]


def _given(item: Item) -> list[object]:
    """What an item has besides: given pictures, clips, a mask, shuffled captions; nothing for others, whose digests stay what
    they were."""
    given: list[object] = []
    if item.clips:
        given.append([item.clips, item.condition_sizes])
    elif item.conditions:
        given.append([item.condition_digests, item.condition_sizes])
    if item.mask is not None:
        given.append({"mask": item.mask[1:]})
    if item.orders:
        given.append({"orders": item.orders})
    return given
