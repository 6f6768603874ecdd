"""Curves as inline SVG, in the colours of the page they stand on."""

from __future__ import annotations

import html
import math
from typing import Any, NamedTuple

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 34
_MOST_POINTS = 300


def loss_chart(title: str, history: list[dict[str, Any]]) -> str:
    """A chart of `loss` and `validation_loss` over `step`, as HTML; empty where the history has no loss.

    Entries may lack either. The training loss is averaged over neighbouring steps where there are more than 300. The
    vertical axis is logarithmic, unless a loss is zero or below.
    """
    series = [("loss", "first", _thin(_points(history, "loss")))]
    series.append(("validation loss", "second", _points(history, "validation_loss")))
    series = [(name, colour, points) for name, colour, points in series if points]
    if not series:
        return ""
    steps = [step for _, _, points in series for step, _ in points]
    values = [value for _, _, points in series for _, value in points]
    logarithmic = min(values) > 0
    ticks = _log_ticks(min(values), max(values)) if logarithmic else _linear_ticks(min(values), max(values))
    height = math.log if logarithmic else float
    low, high = height(min(*values, *ticks)), height(max(*values, *ticks))
    last = max(max(steps), 1)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (height(value) - low) / ((high - low) or 1))

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        label = f"{last * share:,.0f}" + (" steps" if share == 1.0 else "")
        parts.append(f'<text x="{x(last * share):.1f}" y="{_HEIGHT - 10}" text-anchor="{anchor}">{label}</text>')
    for _, colour, points in series:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline class="{colour}" fill="none" stroke-width="2" points="{path}"/>')
        if len(points) == 1:  # a line of one point is not seen
            cx, cy = path.split(",")
            parts.append(f'<circle class="{colour}" fill="none" stroke-width="2" cx="{cx}" cy="{cy}" r="3"/>')
    key = '<span class="key"><i class="{}"></i>{} {:.4g}</span>'
    keys = "".join(key.format(colour, name, points[-1][1]) for name, colour, points in series)
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f'<div class="chart"><h3>{html.escape(title)}</h3>{picture}{keys}</div>'


class Point(NamedTuple):
    """A measured value at a setting, and its interval."""

    setting: float
    value: float
    low: float
    high: float


def interval_chart(title: str, setting: str, points: list[Point], chosen: float | None = None) -> str:
    """A chart of a figure against a setting, its intervals as bars, as HTML; the chosen setting's point is filled.

    Settings stand at equal distances, in order, as they are usually doubled. Intervals without end are not drawn.
    """
    points = sorted(points)
    ends = [end for point in points for end in (point.value, point.low, point.high) if math.isfinite(end)]
    ticks = _linear_ticks(min(ends), max(ends))
    low, high = ticks[0], ticks[-1]
    room = (_WIDTH - _LEFT - _RIGHT) / max(len(points), 1)

    def y(value: float) -> float:
        value = min(max(value, low), high)
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / ((high - low) or 1))

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    places = [(_LEFT + room * (number + 0.5), point) for number, point in enumerate(points)]
    path = " ".join(f"{x:.1f},{y(point.value):.1f}" for x, point in places)
    parts.append(f'<polyline class="first" fill="none" stroke-width="2" points="{path}"/>')
    for number, (x, point) in enumerate(places):
        if math.isfinite(point.low) and math.isfinite(point.high):
            parts.append(
                f'<line class="first" stroke-width="2" x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{y(point.low):.1f}" y2="{y(point.high):.1f}"/>'
            )
        kind = "first chosen" if point.setting == chosen else "first"
        parts.append(f'<circle class="{kind}" stroke-width="2" cx="{x:.1f}" cy="{y(point.value):.1f}" r="4"/>')
        label = f"{point.setting:g}" + (f" {setting}" if number == len(places) - 1 else "")
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{html.escape(label)}</text>')
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f'<div class="chart"><h3>{html.escape(title)}</h3>{picture}</div>'


def _points(history: list[dict[str, Any]], key: str) -> Points:
    found = [(float(row["step"]), float(row[key])) for row in history if row.get(key) is not None]
    return sorted(point for point in found if math.isfinite(point[1]))


def _thin(points: Points) -> Points:
    run = -(-len(points) // _MOST_POINTS)
    if run <= 1:
        return points
    parts = [points[start : start + run] for start in range(0, len(points), run)]
    return [(sum(step for step, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    below = max(tick for tick in ticks if tick <= low * (1 + 1e-9))
    above = min(tick for tick in [*ticks, ticks[-1] * 2] if tick >= high * (1 - 1e-9))
    ticks = [tick for tick in ticks if below <= tick <= above]
    return ticks if len(ticks) <= 8 else [tick for tick in ticks if round(math.log10(tick), 6).is_integer()] or ticks


def _linear_ticks(low: float, high: float) -> list[float]:
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    step = next(step * part for part in (0.2, 0.5, 1, 2, 5) if span / (step * part) <= 6)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
