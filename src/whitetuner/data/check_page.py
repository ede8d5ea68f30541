"""report.html of a check: the crops as they will be cut, sizes, findings; one file that opens offline."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from whitetuner.data.check import CheckReport, Placed
from whitetuner.data.check_video import FilmPlan
from whitetuner.data.media import crop_box, read
from whitetuner.data.video import frames_of, is_clip
from whitetuner.errors import UserError
from whitetuner.records import Size
from whitetuner.runs.film import contact_sheet

#: Pictures shown, and the longer side of their thumbnails in pixels: a page of about half a megabyte.
SHOWN, THUMBNAIL_PX = 48, 240

#: Findings listed one by one; the rest is counted.
LISTED = 500


@dataclass(frozen=True)
class Thumbnail:
    """image: data URL; left, top, width, height: the part that is kept, in percent of the picture; given: data URLs and sizes
    of its conditions.
    """

    placed: Placed
    image: str
    left: float
    top: float
    width: float
    height: float
    given: tuple[tuple[str, Size], ...] = ()


def write_check_html(report: CheckReport, path: Path) -> Path:
    """Writes the page. Raises UserError when it cannot be written."""
    environment = Environment(loader=PackageLoader("whitetuner.data"), autoescape=True, trim_blocks=True)
    largest = max((count for _, count in report.buckets), default=1)
    with ThreadPoolExecutor() as pool:
        thumbnails = [one for one in pool.map(_thumbnail, _chosen(report)) if one is not None]
    text = environment.get_template("check.html").render(
        report=report,
        sets=[
            (one, sum(p.set_index == number for p in report.pictures))
            for number, one in enumerate(report.sets)
        ],
        problems=report.problems[:LISTED],
        unlisted=max(0, len(report.problems) - LISTED),
        largest=largest,
        thumbnails=thumbnails,
        usable=[one for one in report.pictures if one.size is not None],
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            "the report cannot be written ({reason})",
            where=str(path),
            mend="mend the folder's rights, or make room on the disk",
            reason=error.strerror or error,
        ) from error
    return path


def _chosen(report: CheckReport) -> list[Placed]:
    """The most cropped half, then pictures spread over the set."""
    usable = [one for one in report.pictures if one.size is not None]
    worst = sorted(usable, key=lambda one: -one.cropped)[: SHOWN // 2]
    taken = {id(one) for one in worst}
    rest = [one for one in usable if id(one) not in taken]
    room = SHOWN - len(worst)
    return worst + rest[:: max(1, -(-len(rest) // room))]


def _thumbnail(placed: Placed) -> Thumbnail | None:
    assert placed.source is not None and placed.size is not None, "chosen from the usable"
    source = placed.source
    try:
        image = _small(placed.path, source, THUMBNAIL_PX)
        given = tuple(
            (_small(path, size, THUMBNAIL_PX // 3), size)
            for path, size in zip(placed.conditions, placed.condition_sizes, strict=True)
        )
        if placed.film is not None:
            given = (_sheet(placed.film, placed.size),)
    except UserError:
        return None  # damaged behind its header: `deep`, or caching, will say so; here it only goes without a picture
    left, top, right, bottom = crop_box(source, placed.size)
    return Thumbnail(
        placed,
        image,
        100 * left / source.width,
        100 * top / source.height,
        100 * (right - left) / source.width,
        100 * (bottom - top) / source.height,
        given,
    )


def _sheet(film: FilmPlan, size: Size) -> tuple[str, Size]:
    """Contact sheet of the first clip as it will be cut, with the numbers of its frames in the source."""
    clip = film.clips[0]
    chosen = [clip[round(index * (len(clip) - 1) / 7)] for index in range(8)] if len(clip) > 8 else list(clip)
    small = size._replace(width=max(16, size.width // 4), height=max(16, size.height // 4))
    sheet = contact_sheet(frames_of(film.path, chosen, small), chosen)
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii"), size


def _small(path: Path, shape: Size, longest: int) -> str:
    """The picture as a data URL, scaled to the longer side; shape: of what is shown."""
    scale = min(1.0, longest / max(shape.width, shape.height))
    small = Size(max(1, round(shape.width * scale)), max(1, round(shape.height * scale)))
    stream = io.BytesIO()
    seen = frames_of(path, [0])[0] if is_clip(path) else read(path, small)
    seen.resize((small.width, small.height)).save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
