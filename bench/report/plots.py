"""Drawings for the page: small SVG texts that follow the page's colours, light or dark.

Every drawing has a title and a description for those who don't see it; series differ in shape as well as in
colour. Nothing here knows what a record is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 46
MARKS = ("circle", "square", "diamond", "triangle", "cross", "ring")
SERIES = len(MARKS)


@dataclass(frozen=True)
class Series:
    """A line, or points alone.

    Attributes:
        name: what the legend says.
        x: in ascending order for a line.
        y: the values, None where there is none.
        low: the lower ends of intervals, if any.
        high: their upper ends.
        joined: whether the points are joined.
        labels: a text at each point, if any.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    joined: bool = True
    labels: Sequence[str] = ()
    marked: bool = True


@dataclass(frozen=True)
class Axis:
    """A direction: its name, and its two ends; `log` for powers of ten."""

    name: str
    low: float
    high: float
    log: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(max(value, 1e-300)) - low) / ((high - low) or 1)
        return (value - self.low) / ((self.high - self.low) or 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Values at which to draw a line, and their names."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first + 1) / 7))
            return [(10.0**power, _power(power)) for power in range(first, last + 1, step)]
        apart = _round_step((self.high - self.low) / 5)
        count = math.floor((self.high - self.low) / apart + 1e-9) + 1
        values = [math.ceil(self.low / apart - 1e-9) * apart + at * apart for at in range(count)]
        return [
            (v, f"{100 * v:.0f}%" if self.percent else f"{v:.6g}") for v in values if v <= self.high + 1e-9
        ]


def _round_step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough or 1))
    return next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough - 1e-12)


def _power(power: int) -> str:
    """As a person writes it."""
    if -3 <= power <= 3:
        return f"{10.0**power:g}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def span(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The ends of an axis that holds all values with a little room."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(found), max(found)
    if log:
        return low / 1.3, high * 1.3
    room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return low - room, high + room


def chart(series: Sequence[Series], x: Axis, y: Axis, title: str, description: str) -> Markup:
    """Lines or points with their intervals, a grid, axes and a legend below."""
    parts = [*_frame(x, y)]
    for at, one in enumerate(series):
        parts.append(_drawn(one, x, y, at % SERIES))
    legend = _legend(series)
    return svg(WIDTH, HEIGHT, "".join(parts), title, description) + legend


def svg(width: int, height: int, content: str, title: str, description: str) -> Markup:
    """A drawing with its words."""
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{words}{content}</svg>"
    )


def _at(x: Axis, y: Axis, px: float, py: float) -> tuple[float, float]:
    across = LEFT + min(max(x.place(px), -0.02), 1.02) * (WIDTH - LEFT - RIGHT)
    up = HEIGHT - BOTTOM - min(max(y.place(py), -0.02), 1.02) * (HEIGHT - TOP - BOTTOM)
    return round(across, 1), round(up, 1)


def _frame(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value, name in x.ticks():
        across, _ = _at(x, y, value, y.low)
        parts.append(f'<line class="grid" x1="{across}" x2="{across}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{name}</text>')
    for value, name in y.ticks():
        _, up = _at(x, y, x.low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up}" y2="{up}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up + 4}" text-anchor="end">{name}</text>')
    centre, middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{centre}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.name)}</text>')
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{escape(y.name)}</text>')
    return parts


def _drawn(one: Series, x: Axis, y: Axis, number: int) -> str:
    points = [(at, px, py) for at, (px, py) in enumerate(zip(one.x, one.y, strict=True)) if py is not None]
    parts = []
    for at, px, _ in points if one.low else []:
        across, low = _at(x, y, px, one.low[at])
        _, high = _at(x, y, px, one.high[at])
        parts.append(f'<line class="s{number} bar" x1="{across}" x2="{across}" y1="{low}" y2="{high}"/>')
    if one.joined and len(points) > 1:
        path = " ".join("{},{}".format(*_at(x, y, px, py)) for _, px, py in points)
        parts.append(f'<polyline class="s{number}" points="{path}"/>')
    for at, px, py in points if one.marked else []:
        across, up = _at(x, y, px, py)
        parts.append(mark(number, across, up))
        if one.labels:
            anchor = "end" if x.place(px) > 0.75 else "start"
            shift = -8 if anchor == "end" else 8
            place = f'x="{across + shift}" y="{up + 4}" text-anchor="{anchor}"'
            parts.append(f"<text {place}>{escape(one.labels[at])}</text>")
    return "".join(parts)


def mark(number: int, x: float, y: float) -> str:
    """A point's shape: each series has its own."""
    kind, css = MARKS[number % SERIES], f'class="s{number} mark"'
    if kind == "circle":
        return f'<circle {css} cx="{x}" cy="{y}" r="4"/>'
    if kind == "ring":
        return f'<circle {css} cx="{x}" cy="{y}" r="4" fill-opacity="0"/>'
    if kind == "square":
        return f'<rect {css} x="{x - 3.5}" y="{y - 3.5}" width="7" height="7"/>'
    thin, long = 1, 4
    cross = [(-long, -thin), (-thin, -thin), (-thin, -long), (thin, -long), (thin, -thin), (long, -thin)]
    shapes: dict[str, list[tuple[float, float]]] = {
        "diamond": [(0, -5), (5, 0), (0, 5), (-5, 0)],
        "triangle": [(0, -5), (4.5, 4), (-4.5, 4)],
        "cross": [*cross, *((-dx, -dy) for dx, dy in cross)],
    }
    corners = " ".join(f"{round(x + dx, 1)},{round(y + dy, 1)}" for dx, dy in shapes[kind])
    return f'<polygon {css} points="{corners}"/>'


def _legend(series: Sequence[Series]) -> Markup:
    if len(series) < 2:
        return Markup("")
    entries = []
    for at, one in enumerate(series):
        number = at % SERIES
        line = f'<line class="s{number} bar" x1="0" x2="16" y1="8" y2="8"/>' if one.joined else ""
        swatch = line + (mark(number, 8, 8) if one.marked else "")
        entries.append(
            f'<li><svg viewBox="0 0 16 16" aria-hidden="true">{swatch}</svg>{escape(one.name)}</li>'
        )
    return Markup(f'<ul class="legend">{"".join(entries)}</ul>')


def interval(value: float, low: float, high: float, least: float, most: float) -> Markup:
    """A mean with its interval on a line from `least` to `most`, to stand in a table's cell."""
    width, room = 110, most - least or 1.0

    def across(number: float) -> float:
        return round(3 + (width - 6) * min(max((number - least) / room, 0), 1), 1)

    start, end = across(low), across(high)
    return Markup(
        f'<svg class="interval" viewBox="0 0 {width} 14" aria-hidden="true">'
        f'<line class="grid" x1="3" x2="{width - 3}" y1="7" y2="7"/>'
        f'<line class="bar s0" x1="{start}" x2="{end}" y1="7" y2="7"/>'
        f'<circle class="s0 mark" cx="{across(value)}" cy="7" r="3.5"/></svg>'
    )
