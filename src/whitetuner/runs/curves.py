"""Curves as inline SVG: thinned to what a screen can show, scaled so that one wild value does not flatten the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]

#: Points drawn of a curve; more than a screen has pixels would only make the file big.
POINTS = 800
#: Share of the values that the axis leaves out at either end (they are drawn at its edge).
OUTLIERS = 0.005


@dataclass(frozen=True)
class Line:
    """One curve. color: CSS; label: for the legend ("": none); dots: a few measured points, none of which the axis leaves out."""

    points: Points
    color: str
    label: str = ""
    width: float = 2.0
    opacity: float = 1.0
    dots: bool = False


def thin(points: Points, most: int = POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: the mean of each stretch, so that no part of the curve is left out."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def smooth(points: Points) -> list[tuple[float, float]]:
    """Running mean over about a fiftieth of the points, without a bias towards the first (as Adam corrects its moments)."""
    weight = 1 - 1 / max(20.0, len(points) / 50)
    mean, total, found = 0.0, 0.0, []
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        found.append((x, mean / total))
    return found


def chart(
    lines: Sequence[Line],
    *,
    marks: Sequence[float] = (),
    width: int = 1000,
    height: int = 260,
    form: str = ".3g",
) -> Markup:
    """The SVG of some curves over one pair of axes; marks: steps shown as ticks below (checkpoints). Empty without points."""
    shown = [(line, thin([(x, y) for x, y in line.points if math.isfinite(y)])) for line in lines]
    shown = [(line, points) for line, points in shown if points]
    if not shown or max(len(points) for _, points in shown) < 2:
        return Markup("")
    left, right, top, bottom = 62, width - 12, 10, height - 24
    low, high = _span(
        [y for line, points in shown if not line.dots for _, y in points],
        [y for line, points in shown if line.dots for _, y in points],
    )
    first = min(points[0][0] for _, points in shown)
    last = max(points[-1][0] for _, points in shown)

    def at(x: float, y: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, (y - low) / (high - low)))
        return left + (right - left) * (x - first) / max(1e-9, last - first), bottom - (bottom - top) * share

    rows = []
    for value in ticks(low, high):
        y = at(first, value)[1]
        rows.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        rows.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:{form}}</text>')
    for value in ticks(first, last, 8):
        if value == int(value):
            x = at(value, low)[0]
            rows.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{int(value)}</text>')
    for mark in marks:
        x = at(mark, low)[0]
        rows.append(
            f'<path d="M{x:.1f} {bottom} l-4 7 h8 z" fill="var(--soft)"><title>checkpoint {int(mark)}</title></path>'
        )
    for line, points in shown:
        places = [at(*point) for point in points]
        if line.dots:
            rows += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{line.color}"/>' for x, y in places]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        rows.append(
            f'<polyline fill="none" stroke="{line.color}" stroke-opacity="{line.opacity}" stroke-width="{line.width}" '
            f'stroke-linejoin="round" points="{path}"/>'
        )
    legend = [line for line, _ in shown if line.label]
    key = "".join(
        f'<span><i style="background:{line.color}"></i>{escape(line.label)}</span>' for line in legend
    )
    svg = f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(rows)}</svg>'
    return Markup(
        f"<figure>{svg}<figcaption>{key}</figcaption></figure>" if key else f"<figure>{svg}</figure>"
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside [low, high], a few."""
    raw = (high - low) / about
    if not raw > 0:
        return [low]
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 2.5, 5, 10) if base * factor >= raw * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(start, math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float], whole: Sequence[float]) -> tuple[float, float]:
    """The axis: nearly all values and the whole of the others with some air, from zero where that costs little."""
    ordered = sorted(values)
    cut = int(len(ordered) * OUTLIERS)
    edges = [*ordered[cut : len(ordered) - cut], *whole]
    low, high = min(edges), max(edges)
    air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    bottom = 0.0 if 0 <= low < 0.5 * high else low - air
    return bottom, high + air
