"""A look over data sets before anything is loaded: every problem at once, and what training would make of each picture.

From headers and file ends, ten thousand pictures in seconds; `deep` decodes them.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whitetuner.data.buckets import bucketing, covers, cropped, shapes
from whitetuner.data.check_video import TOLD, FilmPlan, plan_film
from whitetuner.data.duplicates import duplicates_of
from whitetuner.data.problems import Problem, merged
from whitetuner.data.scan import Films, place, place_conditions
from whitetuner.data.set_options import SetOptions
from whitetuner.data.survey import Found, PictureSet, Survey, survey
from whitetuner.errors import UserError
from whitetuner.records import Size

#: A larger part of a picture being cut off is worth a word.
CROPPED_TOO_MUCH = 0.2

#: Words and Chinese characters of a caption beyond which, without a tokenizer, it is called long: about 512 tokens.
LONG_CAPTION = 380

#: Visits of each picture that trainers of these models advise, and the steps they don't go below (docs/datasets.md).
VISITS, LEAST_STEPS, MOST_STEPS = 60, 500, 6000


@dataclass(frozen=True)
class Placed:
    """One picture and what training makes of it. cropped: share of its area that is cut off; size None: cannot be used.

    conditions: the pictures given for it; condition_sizes: what they are read at; film: of a video, its clips (size.frames
    long); masked: whether something says what of it counts
    """

    path: Path
    set_index: int
    caption: str | None
    source: Size | None
    size: Size | None
    cropped: float = 0.0
    enlarged: bool = False
    small: bool = False
    conditions: tuple[Path, ...] = ()
    condition_sizes: tuple[Size, ...] = ()
    film: FilmPlan | None = None
    masked: bool = False


@dataclass(frozen=True)
class CheckReport:
    """buckets: (size, pictures), most first; duplicates: files of equal content; seconds: the look took."""

    sets: tuple[PictureSet, ...]
    pictures: tuple[Placed, ...]
    problems: tuple[Problem, ...]
    buckets: tuple[tuple[Size, int], ...]
    duplicates: tuple[tuple[Path, ...], ...]
    suggested_steps: int
    small_batches: int
    batch_size: int
    deep: bool
    seconds: float

    @property
    def errors(self) -> list[Problem]:
        """What stops a run."""
        return [problem for problem in self.problems if problem.level == "error"]

    @property
    def usable(self) -> int:
        return sum(one.size is not None and one.caption is not None for one in self.pictures)

    def items(self, placed: Placed) -> int:
        """Things to learn from in an epoch: one picture, or a video's clips (at random: one of them); none where it cannot be
        used.
        """
        if placed.size is None or placed.caption is None:
            return 0
        at_random = self.sets[placed.set_index].options.clips == "random"
        return 1 if placed.film is None or at_random else len(placed.film.clips)

    @property
    def given(self) -> list[tuple[int, int]]:
        """(given pictures, targets that have so many), fewest first; empty where there are none at all."""
        counts = Counter(len(one.conditions) for one in self.pictures if one.size is not None)
        return sorted(counts.items()) if any(counts) else []

    def masked(self, set_index: int) -> int:
        """Pictures of a set that have a mask."""
        return sum(one.masked for one in self.pictures if one.set_index == set_index)

    @property
    def mean_cropped(self) -> float:
        shares = [one.cropped for one in self.pictures if one.size is not None]
        return sum(shares) / len(shares) if shares else 0.0

    def as_json(self) -> dict[str, Any]:
        """For programs; paths as strings, sizes in pixels."""
        worst = max(self.pictures, key=lambda one: one.cropped, default=None)
        return {
            "ok": not self.errors,
            "pictures": len(self.pictures),
            "usable": self.usable,
            "sets": [
                {
                    "name": one.name,
                    "folder": str(one.folder),
                    "pictures": sum(placed.set_index == number for placed in self.pictures),
                    "repeats": one.repeats,
                    "weight": one.weight,
                    "loss_weight": one.options.loss_weight,
                    "masked": self.masked(number),
                }
                for number, one in enumerate(self.sets)
            ],
            "problems": [
                {
                    "kind": one.kind,
                    "level": one.level,
                    "path": str(one.path),
                    "what": one.error.what,
                    "mend": one.error.mend,
                }
                for one in self.problems
            ],
            "buckets": [
                {"width": size.width, "height": size.height, "frames": size.frames, "count": count}
                for size, count in self.buckets
            ],
            "films": [one.film.as_json() for one in self.pictures if one.film is not None],
            "cropped": {
                "mean": round(self.mean_cropped, 4),
                "worst": round(worst.cropped, 4) if worst else 0.0,
                "worst_file": str(worst.path) if worst and worst.cropped else None,
            },
            "conditions": {str(count): targets for count, targets in self.given},
            "duplicates": [[str(path) for path in group] for group in self.duplicates],
            "batch_size": self.batch_size,
            "small_batches": self.small_batches,
            "suggested_steps": self.suggested_steps,
            "deep": self.deep,
            "seconds": round(self.seconds, 3),
        }

    def as_text(self) -> str:
        """For a terminal: sets, sizes, what is wrong (each finding with its first files), what to do next."""
        lines = []
        for number, one in enumerate(self.sets):
            count = sum(placed.set_index == number for placed in self.pictures)
            share = f"weight {one.weight:g}" if one.weight is not None else f"x {one.repeats}"
            share += f", loss x {one.options.loss_weight:g}" if one.options.loss_weight != 1 else ""
            lines.append(f"{one.folder}: {count} pictures {share}")
            if masked := self.masked(number):
                lines.append(f"  {masked} with a mask; the rest counts {one.options.mask_floor:g}")
        films = [one.film for one in self.pictures if one.film is not None]
        lines += [f"  {film}" for film in films[:TOLD]]
        lines += [f"  and {len(films) - TOLD} more videos"] if len(films) > TOLD else []
        shown = ", ".join(f"{_told(size)}: {count}" for size, count in self.buckets[:8])
        if shown:
            lines.append(f"trained at {shown}; {self.mean_cropped:.1%} of the pixels are cut off on average")
        if len(self.buckets) > 8:
            lines.append(f"  and {len(self.buckets) - 8} more sizes")
        if self.given:
            told = ", ".join(f"{targets} with {count}" for count, targets in self.given)
            lines.append(f"given pictures (conditions) of the targets: {told}")
        for level in ("error", "warning", "note"):
            folder = self.sets[0].folder if len(self.sets) == 1 else None
            found = merged((one for one in self.problems if one.level == level), folder)
            lines += [f"{level}: {error}" for error in found]
        tally = Counter(one.level for one in self.problems)
        lines.append(
            f"{self.usable} of {len(self.pictures)} pictures can be used; {tally['error']} errors, "
            f"{tally['warning']} warnings, {tally['note']} notes ({self.seconds:.1f} s)"
        )
        if self.usable:
            lines.append(f"steps to begin with: {self.suggested_steps} at batch size {self.batch_size}")
        return "\n".join(lines)


def check_sets(
    sections: Sequence[object],
    stride_px: int = 16,
    *,
    min_size_px: int = 64,
    most_conditions: int | None = None,
    films: Films = Films(),  # noqa: B008 - frozen
    batch_size: int = 1,
    deep: bool = False,
    tokens: Callable[[str], int] | None = None,
    max_tokens: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Everything that can be said of the sets. Raises nothing for what is wrong with them.

    sections: objects with the fields of SetOptions; most_conditions: that the model takes, None: any number
    films: what the model wants of videos
    tokens: counts a caption's tokens as the model does (None: words are counted), of which it reads max_tokens
    deep: decode every picture; progress: told (pictures looked at, pictures in all)
    """
    began = time.perf_counter()
    looked = survey(sections, deep, progress)
    problems = list(looked.problems)
    placed = []
    for found in looked.found:
        of = looked.sets[found.set_index]
        try:
            size, problem = place(found, of, stride_px, min_size_px)
        except UserError as error:  # the set's resolution: told once, its pictures stay unplaced
            size, problem = None, Problem("resolution", "error", of.folder, error)
        if problem is not None:
            problems.append(problem)
        conditions, wrong = place_conditions(found, of, stride_px, most_conditions)
        problems += wrong
        if conditions is None:
            size = None
        film = None
        if found.probe.times and found.probe.size is not None:
            film, more = plan_film(found, of, films)
            problems += more
            size = size._replace(frames=len(film.clips[0])) if size and film and film.clips else None
        placed.append(_placed(found, size, conditions or (), of.options, stride_px, min_size_px, film))
        problems += _picture_problems(found, placed[-1])
        for path, seen in zip(found.conditions, found.condition_probes, strict=True):
            problems += _trait_problems(path, seen.traits)
    problems += _caption_problems(looked, tokens, max_tokens)
    duplicates = duplicates_of(looked)
    problems += [
        Problem(
            "duplicate",
            "warning",
            path,
            UserError(
                "same content as {first}: it is learned more often than the others",
                where=str(path),
                mend="delete one of them, unless you mean it",
                first=group[0].name,
            ),
        )
        for group in duplicates
        for path in group[1:]
    ]
    sizes = Counter(one.size for one in placed if one.size is not None for _ in range(_items(one, looked)))
    visits = Counter(
        (one.size, one.condition_sizes)
        for one in placed
        if one.size is not None
        for _ in range(looked.sets[one.set_index].repeats * _items(one, looked))
    )
    return CheckReport(
        sets=looked.sets,
        pictures=tuple(placed),
        problems=_once(problems),
        buckets=tuple(sorted(sizes.items(), key=lambda row: (-row[1], row[0]))),
        duplicates=duplicates,
        suggested_steps=suggested_steps(sum(sizes.values()), batch_size),
        small_batches=sum(count % batch_size != 0 for count in visits.values()),
        batch_size=batch_size,
        deep=deep,
        seconds=time.perf_counter() - began,
    )


def _items(placed: Placed, looked: Survey) -> int:
    """See CheckReport.items; of those that can be used."""
    at_random = looked.sets[placed.set_index].options.clips == "random"
    return 1 if placed.film is None or at_random else len(placed.film.clips)


def _told(size: Size) -> str:
    frames = f" x {size.frames} frames" if size.frames > 1 else ""
    return f"{size.width}x{size.height}{frames}"


def suggested_steps(pictures: int, batch_size: int) -> int:
    """Optimizer steps to begin with: each picture seen sixty times, within sensible bounds, rounded to fifties."""
    wanted = min(MOST_STEPS, max(LEAST_STEPS, VISITS * pictures)) / batch_size
    return max(50, round(wanted / 50) * 50)


def _placed(
    found: Found,
    size: Size | None,
    conditions: tuple[Size, ...],
    options: SetOptions,
    stride_px: int,
    min_size_px: int,
    film: FilmPlan | None,
) -> Placed:
    source = found.probe.size
    what = (found.path, found.set_index, found.caption, source, size)
    if source is None or size is None:
        return Placed(*what, film=film)
    rules = bucketing(options.resolution, stride_px, min_size_px, options.upscale)
    ordinary = any(
        size._replace(frames=1) in shapes(one, stride_px, rules.shortest_px) for one in rules.resolutions
    )
    return Placed(
        *what,
        cropped=cropped(source, size),
        enlarged=not covers(source, size),
        small=not ordinary,
        conditions=found.conditions,
        condition_sizes=conditions,
        film=film,
        masked=found.mask is not None,
    )


def _picture_problems(found: Found, placed: Placed) -> list[Problem]:
    path, problems = found.path, []
    if placed.cropped > CROPPED_TOO_MUCH and placed.source and placed.size:
        error = UserError(
            "{percent} % are cut off ({width} x {height} becomes {to_width} x {to_height})",
            where=str(path),
            mend="crop it yourself to what matters",
            percent=round(100 * placed.cropped),
            width=placed.source.width,
            height=placed.source.height,
            to_width=placed.size.width,
            to_height=placed.size.height,
        )
        problems.append(Problem("crop", "warning", path, error))
    if placed.small:
        own = UserError(
            "smaller than the resolution: it is trained at its own size",
            where=str(path),
            mend="fine if it is meant; else take a larger picture",
        )
        problems.append(Problem("small", "note", path, own))
    if placed.enlarged:
        enlarged = UserError("enlarged, so it teaches blur", where=str(path), mend="take a larger picture")
        problems.append(Problem("enlarged", "note", path, enlarged))
    return problems + _trait_problems(path, found.probe.traits)


def _trait_problems(path: Path, traits: tuple[str, ...]) -> list[Problem]:
    problems = []
    if "animated" in traits:
        first = UserError(
            "animated: only its first frame is used", where=str(path), mend="save the frame you mean as png"
        )
        problems.append(Problem("animated", "warning", path, first))
    if "transparent" in traits:
        white = UserError(
            "transparent parts become white", where=str(path), mend="fill them yourself if you want another"
        )
        problems.append(Problem("transparent", "note", path, white))
    return problems


def _caption_problems(looked: Survey, tokens: Callable[[str], int] | None, max_tokens: int) -> list[Problem]:
    problems = []
    lengths: dict[str, int] = {}
    for found in looked.found:
        text = found.caption
        if not text:
            continue
        if text not in lengths:
            lengths[text] = tokens(text) if tokens is not None else words(text)
        if tokens is not None and lengths[text] > max_tokens:
            error = UserError(
                "the caption has {count} tokens, the model reads {limit}: its end is not learned",
                where=str(found.path),
                mend="shorten it, or raise max_sequence_length in [model.options] where the family has it",
                count=lengths[text],
                limit=max_tokens,
            )
            problems.append(Problem("long caption", "warning", found.path, error))
        if tokens is None and lengths[text] > LONG_CAPTION:
            guess = UserError(
                "the caption has {count} words: the model may not read all of it",
                where=str(found.path),
                mend="check it together with a config, which counts the model's own tokens",
                count=lengths[text],
            )
            problems.append(Problem("long caption", "note", found.path, guess))
    return problems


def words(text: str) -> int:
    """Words, and characters of scripts that have no blanks."""
    wide = re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", text)
    return len(wide) + len(re.sub(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", " ", text).split())


def _once(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """Errors first; the same finding of the same file only once (a folder can be in several sets)."""
    order = {"error": 0, "warning": 1, "note": 2}
    unique = {(one.kind, one.path, one.error.what): one for one in problems}
    return tuple(sorted(unique.values(), key=lambda one: order[one.level]))
