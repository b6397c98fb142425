"""Line charts as inline SVG without scripts, in the colors of the page, light or dark."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

from ..record.pictures import spread
from .run import Point

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 16, 38
MOST, DOTS = 600, 60  # most points of a line, and most of these that get a dot
TONES = 8  # colors for runs; more runs reuse them, and their letters tell the runs apart


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    tips: tooltip of each point. tone: CSS class that gives its color. mark: text at its end.
    ringed: numbers of the points to ring. errors: of each point, half the height of a band around
    the line; None for none.
    """

    points: Sequence[Point]
    tips: Sequence[str]
    tone: str
    mark: str = ""
    ringed: Sequence[int] = ()
    errors: Sequence[float | None] = ()

    def band(self) -> list[tuple[float, float, float]]:
        """(x, low, high) of the points that have an error."""
        pairs = zip(self.points, self.errors, strict=False)
        return [(x, y - e, y + e) for (x, y), e in pairs if y is not None and e is not None]


def chart(
    title: str,
    lines: Sequence[Line],
    across: str,
    warning: tuple[float, str] | None = None,
    log: bool = False,
) -> str:
    """A <figure>: a heading with the first and last value, axes, lines. across: label of the x
    axis. warning: x and text of a vertical line. log: a logarithmic y axis, for values above 0."""
    known = [(x, y) for line in lines for x, y in line.points if y is not None]
    if not known:
        return ""
    ends = _ends(lines[0]) if len(lines) == 1 else ""
    x_axis = Axis([x for x, _ in known], LEFT, WIDTH - RIGHT, "inside", across == "epoch")
    edges = [y for line in lines for _, *ends in line.band() for y in ends]
    y_axis = Axis([*(y for _, y in known), *edges], HEIGHT - BOTTOM, TOP, log=log)
    parts = [_grid(x_axis, y_axis, across)]
    if warning is not None and x_axis.low <= warning[0] <= x_axis.high:
        x = x_axis(warning[0])
        end = x > WIDTH / 2  # keep the words inside the chart
        parts.append(
            f'<g class="warn"><path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/><text x="'
            f'{x + (4 if end else -4):.1f}" y="{TOP - 4}" text-anchor="{"end" if end else "start"}'
            f'">{escape(warning[1])}</text></g>'
        )
    parts += [_line(line, x_axis, y_axis) for line in lines]
    parts += _marks(lines, x_axis, y_axis)
    label = escape(f"{title} by {across}: {'; '.join(filter(None, map(_told, lines)))}")
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>'
        f'<span class="{lines[0].tone}">{ends}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def number(value: float | None, digits: int = 3) -> str:
    """A value for people, with a true minus; – for none."""
    if value is None:
        return "–"
    if not value:
        return "0"
    if 10**digits <= abs(value) < 1e15:
        text = f"{value:,.0f}"
    else:
        text = re.sub(r"e([-+])0?", r"e\1", f"{value:#.{digits}g}").rstrip(".")
    return "−" + text[1:] if value < 0 else text


def letter(i: int) -> str:
    """A, B, ... Z, AA, BB, ...: a name for run i that fits into a chart."""
    return chr(ord("A") + i % 26) * (1 + i // 26)


def tone(i: int) -> str:
    """The CSS class of run i."""
    return f"run{i % TONES}"


class Axis:
    """Maps data to pixels, with ticks at round values inside the data's range or around it."""

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        ticks: str = "around",
        integer: bool = False,
        log: bool = False,
    ):
        """integer: ticks at integers only. log: data are positive, ticks are powers of ten."""
        self.log = log
        if log:
            values, integer = [math.log10(v) for v in values], True
        low, high = min(values), max(values)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            room = abs(low) / 10 or 1.0
            low, high = low - (0 if integer else room), high + (1 if integer else room)
        locator = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=integer)
        self.ticks = [float(t) for t in locator.tick_values(low, high)]
        if ticks == "around":
            low, high = self.ticks[0], self.ticks[-1]
        else:
            self.ticks = [t for t in self.ticks if low <= t <= high]
        self.low, self.high, self.start, self.end = low, high, start, end
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        # the fewest decimals that show the ticks exactly, within 1 % of a step
        self.decimals = next((d for d in range(7) if abs(round(step, d) - step) < step / 100), 7)

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def label(self, tick: float) -> str:
        if self.log:
            return f"{10**tick:,.6g}"
        if self.decimals > 4 or max(map(abs, self.ticks)) >= 1e7:
            return number(tick)
        text = f"{abs(tick):,.{self.decimals}f}"
        return f"−{text}" if tick < 0 and float(text.replace(",", "")) else text


def _grid(x_axis: Axis, y_axis: Axis, across: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = ['<g class="axes">']
    for t in y_axis.ticks:
        y = y_axis(10**t if y_axis.log else t)
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{y_axis.label(t)}</text>'
        )
    for t in x_axis.ticks:
        parts.append(
            f'<text x="{x_axis(t):.1f}" y="{bottom + 16}" text-anchor="middle">{x_axis.label(t)}'
            "</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(across)}</text></g>'
    )
    return "".join(parts)


def _line(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    """A path that breaks where values are missing, and dots with tooltips. If there are many dots,
    only the last is visible."""
    path, pen, spots = [], "M", list[tuple[int, float, float]]()
    for i in spread(range(len(line.points)), MOST):
        x, y = line.points[i]
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{x_axis(x):.1f} {y_axis(y):.1f}")
        pen = "L"
        spots.append((i, x_axis(x), y_axis(y)))
    if not spots:
        return ""
    dots = []
    for i, x, y in sorted({*spread(spots, DOTS), *(s for s in spots if s[0] in line.ringed)}):
        size = 3 if len(spots) <= 40 or i == spots[-1][0] else 0.1
        place = f'cx="{x:.1f}" cy="{y:.1f}"'
        if i in line.ringed:
            dots.append(f'<circle class="ring" {place} r="6"/>')
        dots.append(f'<circle {place} r="{size}"><title>{escape(line.tips[i])}</title></circle>')
    band = spread(line.band(), MOST)
    around = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
    edge = "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in around)
    shade = f'<path class="band" d="M{edge}Z"/>' if len(band) > 1 else ""
    return f'<g class="line {line.tone}">{shade}<path d="{"".join(path)}"/>{"".join(dots)}</g>'


def _marks(lines: Sequence[Line], x_axis: Axis, y_axis: Axis) -> list[str]:
    """The marks at the ends of lines, moved apart where ends are close."""
    ends = []
    for line in lines:
        known = [(x_axis(x), y_axis(y)) for x, y in line.points if y is not None]
        if line.mark and known:
            ends.append((known[-1][1], known[-1][0], line))
    placed: list[tuple[float, float]] = []
    parts = []
    for y, x, line in sorted(ends, key=lambda end: end[0]):
        near = sorted(range(TOP, HEIGHT - BOTTOM), key=lambda other: abs(other - y))
        free = (b for b in near if all(abs(x - a) > 16 or abs(b - c) > 10 for a, c in placed))
        y = next(free, y)
        placed.append((x, y))
        out = x + 7 + 7 * len(line.mark) > WIDTH  # of the chart; then the mark goes above the end
        place = f'x="{x:.1f}" y="{y - 9:.1f}" text-anchor="end"'
        if not out:
            place = f'x="{x + 7:.1f}" y="{y + 4:.1f}"'
        parts.append(f'<text class="mark {line.tone}" {place}>{escape(line.mark)}</text>')
    return parts


def _ends(line: Line) -> str:
    known = [y for _, y in line.points if y is not None]
    return " → ".join(number(y) for y in ([known[0], known[-1]] if len(known) > 1 else known))


def _told(line: Line) -> str:
    ends = _ends(line).replace(" → ", " to ")
    return f"{line.mark} {ends}".strip() if ends else ""
