"""A look at data sets as the page shows it: every picture with what `check` found, in the order of the scan."""

from __future__ import annotations

import re
import secrets
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from whitetuner.config.schema import Config
from whitetuner.data.check import CheckReport, Placed, check_sets
from whitetuner.data.check_video import FilmPlan
from whitetuner.data.folders import list_folder
from whitetuner.data.pairs import edit_layout
from whitetuner.data.problems import Problem
from whitetuner.data.scan import Films
from whitetuner.data.set_options import SetOptions
from whitetuner.data.survey import PictureSet
from whitetuner.data.video_clips import Clip, spans
from whitetuner.data.video_folders import holds_videos, list_videos
from whitetuner.errors import UserError
from whitetuner.families import registry
from whitetuner.family import ModelPaths
from whitetuner.gui import forms, words
from whitetuner.gui.caption_edits import text_of_bytes
from whitetuner.gui.pickers import Roots
from whitetuner.gui.told import parts
from whitetuner.gui.training_tabs import tab_of
from whitetuner.records import Size

#: What a bare folder is looked at with, as the command line does.
FOLDER_RESOLUTION, FOLDER_STRIDE_PX = 1024, 16
#: Clips of a bare folder have 4 n + 1 frames.
_FILM_STEP = 4
#: Looks that are remembered; an older one is made again when it is asked for.
_KEPT = 8
#: Findings that a new caption settles.
OF_CAPTIONS = ("no caption", "empty caption", "long caption", "encoding", "caption")
_LEVELS = ("error", "warning", "note")


@dataclass
class Row:
    """One picture. caption_file: where its text is or would be, None where one prompt serves all; raw: what the file says."""

    placed: Placed
    caption_file: Path | None
    raw: str | None
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Look:
    """folders: where files may be added, the target's first."""

    name: str
    report: CheckReport
    rows: list[Row]
    others: list[Problem]
    folders: list[Path]
    trigger: str = ""

    def numbers(self, kind: str) -> list[int]:
        """Rows with a finding of a kind; "": all."""
        if not kind:
            return list(range(len(self.rows)))
        return [
            number for number, row in enumerate(self.rows) if any(one.kind == kind for one in row.problems)
        ]

    def summary(self, language: str) -> dict[str, Any]:
        found = [one for row in self.rows for one in row.problems]
        every = [*found, *self.others]
        level = {one.kind: _LEVELS.index(one.level) for one in every}
        kinds = Counter(one.kind for row in self.rows for one in {p.kind: p for p in row.problems}.values())
        levels = Counter(one.level for one in every)
        return {
            "look": self.name,
            "pictures": len(self.rows),
            "usable": self.report.usable,
            "errors": levels["error"],
            "warnings": levels["warning"],
            "notes": levels["note"],
            "kinds": [
                [kind, count, _LEVELS[level[kind]]]
                for kind, count in sorted(kinds.items(), key=lambda one: level[one[0]])
            ],
            "others": [[one.level, one.path.name, *parts(one.error, language)] for one in self.others[:50]],
            "clips": sum(self.report.items(row.placed) for row in self.rows),
            "buckets": [[_shape(size), count] for size, count in self.report.buckets[:12]],
            "steps": self.report.suggested_steps if self.report.usable else 0,
            "folders": [str(one) for one in self.folders],
            "resolution": _text(self.report.sets[0].options.resolution) if self.report.sets else "",
        }

    def row(self, number: int, language: str) -> dict[str, Any]:
        row = self.rows[number]
        placed = row.placed
        return {
            "n": number,
            "name": placed.path.name,
            "caption": row.raw,
            "fixed": row.caption_file is None,
            "text": placed.caption,
            "source": None if placed.source is None else [placed.source.width, placed.source.height],
            "size": None if placed.size is None else [placed.size.width, placed.size.height],
            "cropped": round(100 * placed.cropped),
            "conditions": [one.name for one in placed.conditions],
            "film": "" if placed.film is None else _film(placed.film, language),
            "clips": [] if placed.film is None else [_spans(clip, language) for clip in placed.film.clips],
            "findings": [[one.kind, one.level, *parts(one.error, language)] for one in row.problems],
        }


class Looks:
    """The looks that pages hold, by name."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self._kept: OrderedDict[str, Look] = OrderedDict()
        self._lock = Lock()

    def of_form(self, tab_key: str, text: str, deep: bool) -> Look:
        """The data sets of a form. Raises UserError(s) for what is wrong with the config."""
        tab = tab_of(tab_key)
        config = forms.loaded(text, tab, self.roots).config
        spec = registry.spec(config.model.family)
        sections = [SetOptions.of(one) for one in config.data_sets()]
        return self._look(
            sections,
            spec.stride_px,
            min_size_px=spec.min_size_px,
            films=_films(config),
            batch_size=config.data.batch_size,
            deep=deep,
        )

    def of_folder(self, folder: str, conditions: Sequence[str], resolution: int, deep: bool) -> Look:
        """A bare folder; with target*/ and condition*/ inside, or conditions named, an edit set. Raises UserError."""
        path = self.roots.path(folder)
        given = tuple(self.roots.path(one) for one in conditions if one.strip())
        layout = edit_layout(path) if path.is_dir() and not given else None
        if layout is not None:
            section = SetOptions(target=layout[0], conditions=layout[1], resolution=resolution)
        elif given:
            section = SetOptions(target=path, conditions=given, resolution=resolution)
        elif path.is_dir() and holds_videos(path):
            section = SetOptions(videos=path, resolution=resolution)
        else:
            section = SetOptions(images=path, resolution=resolution)
        return self._look([section], FOLDER_STRIDE_PX, films=Films(_FILM_STEP), deep=deep)

    def get(self, name: object) -> Look:
        """Raises UserError when the look is not remembered any more."""
        with self._lock:
            found = self._kept.get(str(name))
            if found is None:
                raise UserError("this look is not remembered any more", mend="look again")
            self._kept.move_to_end(str(name))
            return found

    def _look(self, sections: Sequence[SetOptions], stride_px: int, **more: Any) -> Look:
        for one in sections:
            for folder in (one.source, one.mask_dir, *one.conditions):
                if folder is not None:
                    self.roots.path(str(folder))
        report = check_sets(sections, stride_px, **more)
        found = _rows(report, self.roots)
        folders = [Path(one) for section in sections for one in (section.source, *section.conditions) if one]
        look = Look(secrets.token_urlsafe(12), report, *found, folders, sections[0].trigger)
        with self._lock:
            self._kept[look.name] = look
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return look


def _rows(report: CheckReport, roots: Roots) -> tuple[list[Row], list[Problem]]:
    """(a row for each picture inside of the roots, findings about no picture)."""
    captions = [_captions(one) for one in report.sets]
    rows, at = [], dict[Path, Row]()
    for placed in report.pictures:
        if not all(roots.allows(path) for path in (placed.path, *placed.conditions)):
            continue
        of = report.sets[placed.set_index]
        beside = captions[placed.set_index].get(placed.path, placed.path.with_suffix(of.options.caption_ext))
        file = None if of.options.prompt is not None or not roots.allows(beside) else beside
        row = Row(placed, file, _read(file) if file is not None else of.options.prompt)
        rows.append(row)
        for path in (placed.path, *((file,) if file else ()), *placed.conditions):
            at.setdefault(path, row)
    others: list[Problem] = []
    for problem in report.problems:
        home = at.get(problem.path)
        (others if home is None else home.problems).append(problem)
    return rows, others


def _films(config: Config) -> Films:
    """What the config's family wants of videos, as far as its facts tell without the model."""
    spec = registry.spec(config.model.family)
    fps = spec.fps_of(config.model_options(), ModelPaths(None)) if spec.frames else 16.0
    return Films(spec.frames, fps, spec.default_size.frames, config.model.task == "i2v")


def _film(film: FilmPlan, language: str) -> str:
    """Of a video: its rate, its frames, and which of them are learned from."""
    used = "; ".join(_spans(clip, language) for clip in film.clips[:3]) + (
        " ..." if len(film.clips) > 3 else ""
    )
    return words.texts("data", language)["film"].format(
        fps=f"{film.fps:.4g}", frames=film.source.frames, clips=len(film.clips), used=used or "-"
    )


def _spans(clip: Clip, language: str) -> str:
    return re.sub(r"\((\d+) of them\)", words.texts("data", language)["film_of"], spans(clip))


def _shape(size: Size) -> str:
    return f"{size.width}x{size.height}" + (f"x{size.frames}" if size.frames > 1 else "")


def _text(resolution: int | Sequence[int]) -> str:
    return str(resolution) if isinstance(resolution, int) else str(resolution[0])


def _captions(of: PictureSet) -> dict[Path, Path]:
    """Picture -> its caption file, where there is one."""
    listed = list_folder if of.options.videos is None else list_videos
    try:
        listing = listed(of.folder, of.options.caption_ext, of.options.recursive)
    except UserError:
        return {}
    return {
        picture: text
        for picture, text in zip(listing.pictures, listing.captions, strict=True)
        if text is not None
    }


def _read(path: Path) -> str | None:
    """The file's text as it is, guessed at where it is not UTF-8 (a change writes UTF-8); None when there is no file."""
    try:
        return text_of_bytes(path.read_bytes())
    except OSError:
        return None
