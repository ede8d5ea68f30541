"""report.html of a run: one file that opens offline, made from the run's folder alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from whitetuner.runs import events
from whitetuner.runs.console import duration
from whitetuner.runs.files import write_atomically
from whitetuner.runs.folder import RunFolder

#: Points drawn of a curve; more than a screen has pixels would only make the file big.
POINTS = 800
#: Preview columns and the side of a thumbnail: bounds the file to a few MB.
COLUMNS, THUMBNAIL_PX = 12, 192
STATUS = {
    "running": ("running", "运行中"),
    "finished": ("finished", "已完成"),
    "stopped": ("stopped and saved", "已停止并保存"),
    "failed": ("failed", "失败"),
    "crashed": ("ended without a word (crash, kill or power cut)", "意外中断"),
}


def write_report(path: Path, status: str | None = None) -> Path:
    """Writes path/report.html. status: as `RunFolder.status`, given by the run itself while it still holds the lock."""
    folder = RunFolder(path)
    found, _ = events.read(folder.events)
    document = folder.document()
    steps = [event for event in found if isinstance(event, events.StepDone)]
    validation = [event for event in found if isinstance(event, events.Validation)]
    failures = [event for event in found if isinstance(event, events.Failed)]
    previews, preview_steps = _previews(folder, [event for event in found if isinstance(event, events.Preview)])
    environment = Environment(loader=PackageLoader("whitetuner.runs"), autoescape=True, trim_blocks=True)
    settings = [
        (key, value, document.get("origins", {}).get(key, "")) for key, value in sorted(_flat(document["config"]).items())
    ]
    text = environment.get_template("report.html").render(
        name=document["config"]["run"]["name"],
        status=STATUS[status or folder.status()],
        random=document.get("resolved", {}).get("random_weights", False),
        facts=_facts(steps, validation),
        failure=failures[-1].reason if failures and found[-1] is failures[-1] else "",
        loss_svg=_loss_svg(steps, validation),
        lr_svg=_curve([(event.step, event.lr) for event in steps], height=110, form="{:.1e}"),
        validation=validation[-12:],
        held_out=bool(validation and validation[-1].held_out),
        levels=list(validation[-1].by_sigma) if validation else [],
        previews=previews,
        preview_steps=preview_steps,
        files=_files(folder),
        messages=[event for event in found if isinstance(event, events.Message)][-50:],
        settings=settings,
        versions=sorted(document["versions"].items()),
    )
    write_atomically(folder.report, text)
    return folder.report


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: the mean of each stretch, so that no part of the curve is left out."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def smooth(points: Sequence[tuple[float, float]], weight: float = 0.95) -> list[tuple[float, float]]:
    """Running mean without a bias towards the first value (as Adam corrects its moments)."""
    mean, total, found = 0.0, 0.0, []
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        found.append((x, mean / total))
    return found


def _facts(steps: list[events.StepDone], validation: list[events.Validation]) -> list[tuple[str, str, str]]:
    facts = []
    if steps:
        seconds = [event.seconds for event in steps]
        facts += [
            ("steps", "步数", str(steps[-1].step)),
            ("loss, last 50", "损失", f"{fmean(event.loss for event in steps[-50:]):.4f}"),
            ("s / step", "秒/步", f"{fmean(seconds[-200:]):.3g}"),
            ("training time", "训练用时", duration(sum(seconds))),
            ("peak memory", "显存/内存峰值", f"{max(event.memory_mb for event in steps) / 1024:.1f} GB"),
        ]
    if len(validation) > 1:
        first, last = validation[0], validation[-1]
        change = 100 * (last.loss / first.loss - 1) if first.loss else 0.0
        facts.append((f"validation since step {first.step}", "验证变化", f"{change:+.1f} %"))
    return facts


def _loss_svg(steps: list[events.StepDone], validation: list[events.Validation]) -> Markup:
    points = [(event.step, event.loss) for event in steps if event.loss is not None]
    return _curve(points, [(event.step, event.loss) for event in validation], mean=True)


def _curve(
    points: Sequence[tuple[float, float]],
    dots: Sequence[tuple[float, float]] = (),
    *,
    height: int = 260,
    mean: bool = False,
    form: str = "{:.3g}",
) -> Markup:
    if len(points) < 2:
        return Markup("")
    width, left, bottom = 1000, 54, height - 22
    last = max(x for x, _ in points)
    top = max(y for _, y in [*points, *dots]) * 1.05 or 1.0

    def at(x: float, y: float) -> str:
        return f"{left + (width - left - 10) * x / last:.1f},{bottom - (bottom - 10) * y / top:.1f}"

    rows = []
    for part in range(5):
        y = bottom - (bottom - 10) * part / 4
        rows.append(f'<line x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        rows.append(f'<text x="4" y="{y + 4:.1f}">{form.format(top * part / 4)}</text>')
    rows.append(f'<text x="{left}" y="{height - 6}">0</text>')
    rows.append(f'<text x="{width - 12}" y="{height - 6}" text-anchor="end">{last:g}</text>')
    opacity, thickness = (0.35, 1) if mean else (1, 2)
    rows.append(
        f'<polyline fill="none" stroke="var(--blue)" stroke-opacity="{opacity}" stroke-width="{thickness}" '
        f'points="{" ".join(at(*point) for point in thin(points))}"/>'
    )
    if mean:
        line = " ".join(at(*point) for point in thin(smooth(points)))
        rows.append(f'<polyline fill="none" stroke="var(--blue)" stroke-width="2.5" points="{line}"/>')
    for point in dots:
        x, y = at(*point).split(",")
        rows.append(f'<circle cx="{x}" cy="{y}" r="4" fill="var(--orange)"/>')
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(rows)}</svg>')


def _previews(folder: RunFolder, found: list[events.Preview]) -> tuple[list[tuple[str, list[str]]], list[int]]:
    if len(found) > COLUMNS:  # first, last and evenly between
        chosen = sorted({round(i * (len(found) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
        found = [found[index] for index in chosen]
    rows: dict[int, tuple[str, list[str]]] = {}
    for column, event in enumerate(found):
        for index, (file, prompt) in enumerate(zip(event.files, event.prompts)):
            row = rows.setdefault(index, (prompt, [""] * len(found)))
            row[1][column] = _thumbnail(folder.path / file)
    return [rows[index] for index in sorted(rows)], [event.step for event in found]


def _thumbnail(path: Path) -> str:
    if not path.is_file():
        return ""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _files(folder: RunFolder) -> list[tuple[str, str]]:
    files = sorted(path for path in folder.final.rglob("*.safetensors")) if folder.final.is_dir() else []
    return [(path.relative_to(folder.path).as_posix(), f"{path.stat().st_size / 2**20:.2f} MB") for path in files]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update(_flat(value, f"{prefix}{key}."))
        elif value not in (None, [], {}, ""):
            found[f"{prefix}{key}"] = value
    return found
