"""Charts as inline SVG, without scripts; the page's style sheet sets the colors, so that they follow light and dark
mode.

Series differ in color, dashes and markers, so color is not needed to read a chart.
Coordinates: x, y are data; u, v are pixels of the drawing, v downward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup, escape

COLOURS = 4  # .c0 to .c3 of the style sheet
TOP, RIGHT, BOTTOM = 16, 14, 40  # pixels around the plot; the left side depends on the labels
CHARACTER = 6.2  # mean width of a character in pixels, at the style sheet's 11 px


Line = Literal["solid", "dashed", "dotted"]


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in the order of x, a color (0 to COLOURS - 1), and its line style."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    line: Line = "solid"


@dataclass(frozen=True)
class Span:
    """One row of a range chart: from `low` to `high`, with `middle` marked."""

    name: str
    low: float
    middle: float
    high: float
    colour: int = 0


@dataclass(frozen=True)
class Mark:
    """A named value that a chart shows as a line across the plot."""

    name: str
    value: float


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` + 1 round values (1, 2 or 5 times a power of ten apart) that cover low..high."""
    if not high > low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def number(value: float) -> str:
    """A short label: 12,000 or 0.25 or 3e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


@dataclass(frozen=True)
class _Frame:
    """The plot's place in the drawing, and the ticks that span its axes."""

    width: int
    height: int
    left: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    y_labels: Sequence[str] = ()

    def u(self, x: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(self.left + (x - low) / (high - low) * (self.width - self.left - RIGHT), 1)

    def v(self, y: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(self.height - BOTTOM - (y - low) / (high - low) * (self.height - BOTTOM - TOP), 1)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    width: int = 460,
    height: int = 230,
) -> Markup:
    """Lines, with markers if there are few points; `marks` are horizontal. Labels include their units.

    Points that are not finite are left out. Returns an empty string if there is nothing to draw.
    """
    lines = [(line, [p for p in line.points if math.isfinite(p[0]) and math.isfinite(p[1])]) for line in series]
    points = [p for _, finite in lines for p in finite]
    if not points:
        return Markup("")
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + [mark.value for mark in marks]
    frame = _frame(width, height, ticks(min(xs), max(xs)), ticks(min(ys), max(ys), 5))
    body = [_grid(frame, x_label, y_label)]
    for mark in marks:
        v = frame.v(mark.value)
        body.append(f'<line class="mark" x1="{frame.left}" y1="{v}" x2="{width - RIGHT}" y2="{v}"/>')
        body.append(
            f'<text class="marked" x="{width - RIGHT}" y="{v - 4}" text-anchor="end">{escape(mark.name)}</text>'
        )
    for line, finite in lines:
        path = " ".join(f"{frame.u(x)},{frame.v(y)}" for x, y in finite)
        shapes = "".join(_marker(frame.u(x), frame.v(y), line) for x, y in finite) if len(finite) <= 16 else ""
        body.append(f'<g class="c{line.colour}"><polyline class="line {line.line}" points="{path}"/>{shapes}</g>')
    names = ", ".join(line.name for line, _ in lines)
    return _svg(width, height, f"{y_label} by {x_label}: {names}", body)


def bar_chart(
    bars: Sequence[tuple[str, float]], x_label: str, y_label: str, width: int = 460, height: int = 210
) -> Markup:
    """Upright bars, one per (label, count), starting at zero. Returns an empty string if there are no bars."""
    if not bars:
        return Markup("")
    y_ticks = ticks(0, max(4, *(value for _, value in bars)), 5)  # no fractions of a count
    frame = _frame(width, height, (0, len(bars)), y_ticks)
    body = [_grid(frame, x_label, y_label, x_named=False)]
    room = frame.u(1) - frame.u(0)
    for n, (label, value) in enumerate(bars):
        u, v = frame.u(n) + 0.12 * room, frame.v(value)
        body.append(
            f'<rect class="column c0" x="{u:.1f}" y="{v}" width="{0.76 * room:.1f}" height="{frame.v(0) - v:.1f}">'
            f"<title>{escape(label)}: {number(value)}</title></rect>"
        )
        middle = u + 0.38 * room
        body.append(f'<text x="{middle:.1f}" y="{height - BOTTOM + 14}" text-anchor="middle">{escape(label)}</text>')
        if value:
            body.append(f'<text x="{middle:.1f}" y="{v - 3}" text-anchor="middle">{number(value)}</text>')
    return _svg(width, height, f"{y_label} by {x_label}", body)


def rank_chart(
    behind: Sequence[float],
    front: Sequence[float],
    x_label: str,
    y_label: str,
    names: tuple[str, str],
    *,
    log: bool = False,
    width: int = 960,
    height: int = 240,
) -> Markup:
    """Two columns for each thing, in the order given: `front` is drawn over `behind`, pale, and is part of it. Where there are more
    things than fit, a column is the largest of several. With `log`, heights are logarithms of 1 + the value.
    """
    if not len(behind):
        return Markup("")
    most = max(*behind, 1)
    room = width - 120
    columns = min(len(behind), room)
    edges = [n * len(behind) // columns for n in range(columns + 1)]
    scaled: Callable[[float], float] = (lambda y: math.log10(1 + y)) if log else float
    powers = [0.0, *(10.0**n for n in range(1 + math.ceil(math.log10(most))))]
    y_ticks = powers if log else ticks(0, most, 5)
    frame = _frame(width, height, (0, len(behind)), [scaled(y) for y in y_ticks], [number(y) for y in y_ticks])
    floor = frame.v(0)
    body = [_grid(frame, x_label, y_label, x_named=False)]
    for x in ticks(0, len(behind), 8):
        if x <= len(behind):
            body.append(f'<text x="{frame.u(x)}" y="{height - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>')
    for values, drawn in ((behind, "column behind"), (front, "column")):
        path = []
        for low, high in pairwise(edges):
            v = frame.v(scaled(max(values[low:high])))
            u, end = frame.u(low), frame.u(high)
            path.append(f"M{u} {floor}V{v}H{max(end - 0.15 * (end - u), u + 0.4):.1f}V{floor}Z")
        body.append(f'<path class="{drawn} c0" d="{"".join(path)}"/>')
    return _svg(width, height, f"{y_label} by {x_label}: {names[0]} (pale) and {names[1]}", body)


def range_chart(spans: Sequence[Span], x_label: str, marks: Sequence[Mark] = (), width: int = 620) -> Markup:
    """One row per span: its range as a bar, its middle as a tick; `marks` are vertical, named above the rows."""
    if not spans:
        return Markup("")
    row, head = 20, 16 * len(marks)
    height = TOP + head + row * len(spans) + BOTTOM
    values = [v for span in spans for v in (span.low, span.high)] + [mark.value for mark in marks]
    left = CHARACTER * max(len(span.name) for span in spans) + 14
    frame = _Frame(width, height, left, ticks(min(values), max(values), 8), (0, 1))
    floor = height - BOTTOM
    body = []
    for x in frame.x_ticks:
        body.append(f'<line class="grid" x1="{frame.u(x)}" y1="{TOP + head}" x2="{frame.u(x)}" y2="{floor}"/>')
        body.append(f'<text x="{frame.u(x)}" y="{floor + 14}" text-anchor="middle">{number(x)}</text>')
    body.append(
        f'<text class="axis" x="{(left + width - RIGHT) / 2:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for n, span in enumerate(spans):
        v = TOP + head + row * n + row / 2
        low, middle, high = (frame.u(x) for x in (span.low, span.middle, span.high))
        body.append(f'<text x="{left - 8}" y="{v + 4}" text-anchor="end">{escape(span.name)}</text>')
        title = "{}: {}, from {} to {}".format(
            span.name, *(number(round(x, 3)) for x in (span.middle, span.low, span.high))
        )
        body.append(
            f'<g class="c{span.colour}"><title>{escape(title)}</title>'
            f'<rect class="span" x="{low}" y="{v - 5}" width="{max(1.0, high - low):.1f}" height="10" rx="2"/>'
            f'<line class="tick" x1="{middle}" y1="{v - 7}" x2="{middle}" y2="{v + 7}"/></g>'
        )
    for n, mark in enumerate(marks):
        u, v = frame.u(mark.value), TOP + 16 * n + 8
        right = u > (left + width) / 2
        body.append(f'<line class="mark" x1="{u}" y1="{v - 8}" x2="{u}" y2="{floor}"/>')
        body.append(
            f'<text class="marked" x="{u - 5 if right else u + 5}" y="{v}" text-anchor="{"end" if right else "start"}">'
            f"{escape(mark.name)} {number(mark.value)}</text>"
        )
    return _svg(width, height, f"{x_label}: {', '.join(span.name for span in spans)}", body)


def key(colour: int, line: Line = "solid") -> Markup:
    """A series' line and marker for a legend."""
    drawn = f'<polyline class="line {line}" points="1,6 27,6"/>{_marker(14, 6, Series("", (), colour, line))}'
    return Markup(
        f'<svg class="key" width="28" height="12" viewBox="0 0 28 12" aria-hidden="true"><g class="c{colour}">{drawn}</g></svg>'
    )


def _frame(
    width: int, height: int, x_ticks: Sequence[float], y_ticks: Sequence[float], y_labels: Sequence[str] = ()
) -> _Frame:
    labels = y_labels or [number(y) for y in y_ticks]
    left = CHARACTER * max(len(label) for label in labels) + 30
    return _Frame(width, height, left, x_ticks, y_ticks, labels)


def _grid(frame: _Frame, x_label: str, y_label: str, x_named: bool = True) -> str:
    floor, right = frame.height - BOTTOM, frame.width - RIGHT
    parts = []
    for y, label in zip(frame.y_ticks, frame.y_labels, strict=True):
        v = frame.v(y)
        parts.append(f'<line class="grid" x1="{frame.left}" y1="{v}" x2="{right}" y2="{v}"/>')
        parts.append(f'<text x="{frame.left - 6}" y="{v + 4}" text-anchor="end">{label}</text>')
    for x in frame.x_ticks if x_named else ():
        u = frame.u(x)
        parts.append(f'<line class="base" x1="{u}" y1="{floor}" x2="{u}" y2="{floor + 4}"/>')
        parts.append(f'<text x="{u}" y="{floor + 16}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<line class="base" x1="{frame.left}" y1="{floor}" x2="{right}" y2="{floor}"/>')
    middle_u, middle_v = (frame.left + right) / 2, (TOP + floor) / 2
    parts.append(
        f'<text class="axis" x="{middle_u:.0f}" y="{frame.height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(11 {middle_v:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _marker(u: float, v: float, one: Series) -> str:
    shapes = (
        f'<circle class="dot" cx="{u}" cy="{v}" r="3.2"/>',
        f'<rect class="dot" x="{u - 3:.1f}" y="{v - 3:.1f}" width="6" height="6"/>',
        f'<path class="dot" d="M{u} {v - 4:.1f}L{u + 4:.1f} {v + 3:.1f}L{u - 4:.1f} {v + 3:.1f}Z"/>',
        f'<path class="dot" d="M{u} {v - 4.2:.1f}L{u + 4.2:.1f} {v}L{u} {v + 4.2:.1f}L{u - 4.2:.1f} {v}Z"/>',
    )
    shape = shapes[one.colour]
    filled = {"solid": "dot", "dashed": "dot hollow", "dotted": "dot pale"}
    return shape.replace('class="dot"', f'class="{filled[one.line]}"')


def _svg(width: int, height: int, title: str, body: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )
