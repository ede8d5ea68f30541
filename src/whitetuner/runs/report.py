"""report.html of a run: one file that opens offline, made from the run's folder alone."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from whitetuner.runs import events
from whitetuner.runs.best import measured
from whitetuner.runs.console import duration
from whitetuner.runs.curves import Line, chart, smooth, thin
from whitetuner.runs.files import inside, write_atomically
from whitetuner.runs.folder import RunFolder

#: Preview columns, rows, and the side of a thumbnail: bounds the file to a few MB.
COLUMNS, ROWS, THUMBNAIL_PX = 8, 24, 224
#: Noise levels are shown in so many equal parts of [0, 1].
SIGMA_PARTS = 5
#: Losses of training that the gap to validation is taken over; pictures in the ranking.
GAP_LOSSES, RANKED = 2000, 40
_SIGMA_COLORS = ("#2a9d8f", "#8ab17d", "#d9a521", "#e07a3f", "#b5446e")
STATUS = {
    "running": ("running", "运行中"),
    "finished": ("finished", "已完成"),
    "stopped": ("stopped and saved", "已停止并保存"),
    "failed": ("failed", "失败"),
    "crashed": ("ended without a word (crash, kill or power cut)", "意外中断"),
}


def write_report(path: Path, status: str | None = None) -> Path:
    """Writes path/report.html. status: as `RunFolder.status`, given by the run itself while it still holds the lock.

    Raises UserError when the folder holds no run.
    """
    folder = RunFolder(path)
    folder.require()
    happened, _ = events.read(folder.events)
    document = folder.document()
    steps = [event for event in happened if isinstance(event, events.StepDone)]
    validation = [event for event in happened if isinstance(event, events.Validation)]
    last = next((event for event in reversed(happened) if not isinstance(event, events.Message)), None)
    previews, preview_steps = _previews(
        folder, [event for event in happened if isinstance(event, events.Preview)]
    )
    settings = [
        (key, value, document.get("origins", {}).get(key, "default"))
        for key, value in _flat(document["config"])
    ]
    environment = Environment(loader=PackageLoader("whitetuner.runs"), autoescape=True, trim_blocks=True)
    text = environment.get_template("report.html").render(
        name=document["config"].get("run", {}).get("name", path.name),
        status=STATUS[status or folder.status()],
        began=_clock(document["began"]) if "began" in document else "",
        random=document.get("resolved", {}).get("random_weights", False),
        facts=[*_facts(steps, validation), *_best(folder, document)],
        failure=last.reason if isinstance(last, events.Failed) else "",
        loss=_loss(
            steps,
            validation,
            [event.step for event in happened if isinstance(event, events.Saved)],
            _of_origin(folder),
        ),
        by_sigma=_by_sigma(steps),
        small=_small(steps),
        validation=[*validation[:1], *validation[1:][-11:]],
        held_out=bool(validation and validation[-1].held_out),
        levels=list(validation[-1].by_sigma) if validation else [],
        ranked=list(validation[-1].by_picture.items())[:RANKED] if validation else [],
        previews=previews,
        preview_steps=preview_steps,
        files=_files(folder, document.get("names", {})),
        notes=_notes(happened)[-80:],
        chosen=[row for row in settings if row[2] != "default"],
        defaults=[row for row in settings if row[2] == "default"],
        resolved=_flat(document.get("resolved", {})),
        machine=[*sorted(document.get("versions", {}).items()), *_flat(document.get("hardware", {}))],
    )
    write_atomically(folder.report, text)
    return folder.report


def _facts(
    steps: Sequence[events.StepDone], validation: Sequence[events.Validation]
) -> list[tuple[str, str, str]]:
    """(English, Chinese, value) of the tiles on top."""
    facts = []
    if steps:
        pace = median(event.seconds for event in steps[-200:])
        pictures = fmean(event.samples for event in steps[-200:]) / max(1e-9, pace)
        facts += [
            ("steps", "步数", str(steps[-1].step)),
            ("loss, last 50", "损失（近 50 步）", f"{fmean(event.loss for event in steps[-50:]):.4f}"),
            ("per step", "每步", _short(pace)),
            ("pictures / s", "图片/秒", f"{pictures:.3g}"),
            ("training time", "训练用时", duration(sum(event.seconds for event in steps))),
            ("peak memory", "显存/内存峰值", f"{max(event.memory_mb for event in steps) / 1024:.1f} GB"),
        ]
    if len(validation) > 1 and validation[0].loss:
        first, last = validation[0], validation[-1]
        change = 100 * (last.loss / first.loss - 1)
        facts.append(
            (f"validation since step {first.step}", f"验证损失（自第 {first.step} 步）", f"{change:+.1f} %")
        )
    gap = _gap(steps, validation)
    if gap is not None:
        facts.append(("training minus validation", "训练损失减验证损失", f"{gap:+.4f}"))
    return facts


def _best(folder: RunFolder, document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A tile for the best checkpoint; none where none was measured."""
    found = measured(folder.checkpoints, str(document.get("run_id")))[:1]
    return [
        (
            f"best checkpoint, held-out loss {one.loss:.4f}",
            f"最佳检查点，验证损失 {one.loss:.4f}",
            one.path.name,
        )
        for one in found
    ]


def _gap(steps: Sequence[events.StepDone], validation: Sequence[events.Validation]) -> float | None:
    """Training minus held-out loss, at like noise levels; None where there is nothing to compare.

    Training draws its levels from a density of its own, so each recent loss is put to the nearest level of the
    validation's grid, and the difference is the mean over the levels that both have seen.
    """
    if not validation or not validation[-1].held_out:
        return None
    held = {float(level): loss for level, loss in validation[-1].by_sigma.items()}
    pairs = [
        pair
        for event in steps
        if event.step <= validation[-1].step
        for pair in zip(event.sigmas, event.losses)
    ]
    near: dict[float, list[float]] = {}
    for sigma, loss in pairs[-GAP_LOSSES:] if held else []:
        near.setdefault(min(held, key=lambda level: abs(level - sigma)), []).append(loss)
    return fmean(fmean(losses) - held[level] for level, losses in near.items()) if near else None


def _of_origin(folder: RunFolder) -> list[Line]:
    """The running mean of the run that this one began from, whole: how it would have gone on."""
    origin = folder.origin()
    if origin is None:
        return []
    happened, _ = events.read(origin[0].events)
    points = [(event.step, event.loss) for event in happened if isinstance(event, events.StepDone)]
    name = origin[0].path.name
    return [Line(smooth(points), "var(--soft)", f"{name}, until step {origin[1]} 分支前 {origin[1]} 步", 1.5)]


def _loss(
    steps: Sequence[events.StepDone],
    validation: Sequence[events.Validation],
    saved: Sequence[int],
    origin: Sequence[Line],
) -> Markup:
    points = [(event.step, event.loss) for event in steps]
    measured = [(event.step, event.loss) for event in validation]
    lines = [
        *origin,
        Line(points, "var(--blue)", "each step 每步", 1.0, 0.3),
        Line(smooth(points), "var(--blue)", "running mean 滑动平均", 2.5),
        Line(measured, "var(--orange)", "validation 验证", 1.5, dots=True),
    ]
    return chart(lines, marks=saved[-60:], height=300)


def _by_sigma(steps: Sequence[events.StepDone]) -> Markup:
    """The running mean of each part of the noise levels: one that rises while others fall is hidden in the sum."""
    parts: list[list[tuple[float, float]]] = [[] for _ in range(SIGMA_PARTS)]
    for event in steps:
        for sigma, loss in zip(event.sigmas, event.losses):
            parts[min(SIGMA_PARTS - 1, int(sigma * SIGMA_PARTS))].append((event.step, loss))
    lines = []
    for index, (points, color) in enumerate(zip(parts, _SIGMA_COLORS)):
        label = f"σ {index / SIGMA_PARTS:.1f}-{(index + 1) / SIGMA_PARTS:.1f}"
        lines.append(Line(smooth(thin(points, 4000)), color, label))
    return chart(lines)


def _small(steps: Sequence[events.StepDone]) -> list[tuple[str, str, Markup]]:
    """(English, Chinese, SVG) of the curves that one looks at only when something is odd."""
    series = (
        ("Learning rate", "学习率", [(event.step, event.lr) for event in steps], ".2g"),
        ("Gradient norm", "梯度范数", [(event.step, event.grad_norm) for event in steps], ".3g"),
        (
            "Weight change from the start",
            "权重变化",
            [(event.step, event.weight_change) for event in steps],
            ".2g",
        ),
        ("Seconds per step", "每步秒数", [(event.step, event.seconds) for event in steps], ".3g"),
    )
    return [
        (english, chinese, chart([Line(points, "var(--blue)", width=1.5)], width=520, height=170, form=form))
        for english, chinese, points, form in series
        if len(points) > 1
    ]


def _previews(
    folder: RunFolder, found: Sequence[events.Preview]
) -> tuple[list[tuple[str, list[str]]], list[int]]:
    """(prompt, one picture per column) rows and the columns' steps: the first, the last and evenly between."""
    if len(found) > COLUMNS:
        found = [found[round(index * (len(found) - 1) / (COLUMNS - 1))] for index in range(COLUMNS)]
    rows: dict[int, tuple[str, list[str]]] = {}
    for column, event in enumerate(found):
        for index, (file, prompt) in enumerate(list(zip(event.files, event.prompts))[:ROWS]):
            row = rows.setdefault(index, (prompt, [""] * len(found)))
            row[1][column] = _thumbnail(folder, file)
    return [rows[index] for index in sorted(rows)], [event.step for event in found]


def _thumbnail(folder: RunFolder, place: str) -> str:
    """A data URI; "" for a picture that is gone, torn, no picture (a clip), or none of this run's folder."""
    path = inside(folder.path, place)
    if path is None:
        return ""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (FileNotFoundError, UnidentifiedImageError, OSError):
        return ""
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _files(folder: RunFolder, names: Mapping[str, Any]) -> list[tuple[str, str]]:
    files = sorted(folder.final.rglob("*.safetensors")) if folder.final.is_dir() else []
    return [
        (place, f"{real.stat().st_size / 2**20:.2f} MB{_known(names.get(place))}")
        for place, real in (
            (path.relative_to(folder.path).as_posix(), inside(folder.path, path)) for path in files
        )
        if real is not None
    ]


def _known(names: Mapping[str, Any] | None) -> str:
    """How many of a file's names its program knows (whitetuner.final_notes)."""
    if not names:
        return ""
    known, total, program = names["known"], names["total"], names["program"]
    if not program:
        return ", not for ComfyUI, which has no such model（ComfyUI 没有这个模型）"
    return f", {known} of {total} keys known to {program}（{total} 个键中 {known} 个为 {program} 所知）"


def _notes(happened: Sequence[events.Event]) -> list[tuple[str, str, str]]:
    """(time, what, text) of everything but steps and progress."""
    notes = []
    for event in happened:
        if isinstance(event, events.RunStarted):
            text = (
                ""
                if event.resumed_from is None
                else f"from step {event.resumed_from} 从第 {event.resumed_from} 步继续"
            )
            notes.append((_clock(event.time), "started 开始", text))
        elif isinstance(event, events.Saved):
            notes.append((_clock(event.time), "saved 保存", f"{event.path} ({_short(event.seconds)})"))
        elif isinstance(event, events.Message):
            notes.append(
                (
                    _clock(event.time),
                    f"{event.level} {'警告' if event.level == 'warning' else '消息'}",
                    event.text,
                )
            )
        elif isinstance(event, events.Failed):
            notes.append((_clock(event.time), "failed 失败", event.reason))
        elif isinstance(event, events.Ended):
            notes.append((_clock(event.time), " ".join(STATUS[event.status]), f"step {event.step}"))
    return notes


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of what is set, in the document's order; tables in lists are numbered."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for index, one in enumerate(value):
                found += _flat(one, f"{key}[{index}].")
        elif value is not None and value not in ([], {}, ""):
            found.append((key, value))
    return found
