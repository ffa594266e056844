"""Curves without a plotting library: SVG as text, coloured by CSS variables, and the same line for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 8, 24
MAX_POINTS = 400
HEAT_COLUMNS, HEAT_ROWS, HEAT_LEVELS = 80, 48, 12

COLOURS_LIGHT = ("#2563c9", "#d9660a", "#1a8a5a", "#a8388e", "#6d6a63", "#b59a00")
COLOURS_DARK = ("#6ea8ff", "#ff9d4d", "#4fcb94", "#e583cd", "#a9a59c", "#e0c83f")


@dataclass(frozen=True)
class Series:
    """A named line; None where a step has no value. All series of a
    chart share its steps. colour, dash: None follows the order.
    """

    name: str
    values: list[float | None]
    colour: int | None = None
    dash: int = 0


def css(selector: str) -> str:
    """The colours of the charts, for a light and for a dark background, as rules on `selector`."""
    light = "--ink:#1d1c1a;--soft:#6d6a63;--rule:#e3e1db;--paper:#fff;" + "".join(
        f"--c{i}:{c};" for i, c in enumerate(COLOURS_LIGHT)
    )
    dark = "--ink:#eceae6;--soft:#a9a59c;--rule:#3a3935;--paper:#1c1b19;" + "".join(
        f"--c{i}:{c};" for i, c in enumerate(COLOURS_DARK)
    )
    lines = "".join(f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}" for i in range(len(COLOURS_LIGHT)))
    return (
        f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}{lines}"
        ".line{fill:none;stroke-width:1.6;stroke-linejoin:round}.faint{opacity:.28;stroke-width:1}.area{opacity:.75}"
        ".d1{stroke-dasharray:5 3}.d2{stroke-dasharray:1.5 2.5}.d3{stroke-dasharray:7 2 1.5 2}.heat{fill:var(--c1)}"
        ".rule{stroke:var(--rule);stroke-width:1}.tick{fill:var(--soft);font:11px system-ui,sans-serif}"
    )


def thin(steps: list[int], series: list[Series]) -> tuple[list[int], list[Series]]:
    """At most MAX_POINTS points: neighbours are averaged, so that a page of a long run stays small."""
    size = -(-len(steps) // MAX_POINTS)
    if size <= 1:
        return steps, series
    groups = [slice(i, i + size) for i in range(0, len(steps), size)]
    return [steps[g][-1] for g in groups], [replace(s, values=[_mean(s.values[g]) for g in groups]) for s in series]


def smooth(values: list[float | None], window: int) -> list[float | None]:
    """Mean of the last `window` values that are there."""
    return [_mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def _mean(values: list[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


class Axes:
    """Maps steps and values to the pixels of a chart; on a logarithmic scale only positive values have a place."""

    def __init__(self, steps: list[int], low: float, high: float, log: bool) -> None:
        self.first, self.last = steps[0], max(steps[-1], steps[0] + 1)
        self.log = log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        least = 0.5 if log else max(abs(self.high) * 1e-6, 1e-12)
        if self.high - self.low < least:
            self.high += max(least, abs(self.high) * 0.1) if self.low or log else 1.0
            self.low -= least if self.low else 0.0

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return TOP + (self.high - at) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[tuple[float, str]]:
        """Values with their labels, three to six of them."""
        if not self.log:
            step = nice((self.high - self.low) / 4)
            numbers = [
                n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
            ]
            return [(value, label(value, step)) for value in numbers]
        digits = (1,) if self.high - self.low > 2 else (1, 2, 5)
        every = max(1, math.ceil((self.high - self.low) / 5))
        powers = range(math.floor(self.low) // every * every, math.floor(self.high) + 1, every)
        numbers = [digit * 10.0**power for power in powers for digit in digits]
        return [(value, label(value)) for value in numbers if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9]

    def frame(self) -> str:
        parts = []
        for value, text in self.ticks():
            y = self.y(value)
            parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        step = max(1, round(nice((self.last - self.first) / 4)))
        for at in range(-(-self.first // step) * step, self.last + 1, step):
            parts.append(f'<text class="tick" x="{self.x(at):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{at}</text>')
        return "".join(parts)


def nice(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(rough, 1e-300)))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def label(value: float, step: float | None = None) -> str:
    """As few characters as tell two ticks apart that lie `step` apart."""
    if value == 0:
        return "0"
    size, least = (math.floor(math.log10(abs(x)) + 1e-9) for x in (value, step or value))
    if size < -3 or size >= 5:
        return f"{value:.{max(0, size - least)}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:.{max(0, -least)}f}"


def line_chart(
    steps: list[int], series: list[Series], *, log: bool = False, low: float | None = None, high: float | None = None
) -> str:
    """The inside of an SVG: one line a series, its noise faint behind
    its moving average where there are many steps. Empty without values.

    low, high: bounds that the axis shows at least. On a logarithmic scale values that are not positive are left out.
    """
    steps, series = thin(steps, series)
    usable = [[v if v is not None and (v > 0 or not log) else None for v in s.values] for s in series]
    present = [v for values in usable for v in values if v is not None]
    if not present:
        return ""
    bounds = [b for b in (low, high) if b is not None]
    axes = Axes(steps, min(present + bounds), max(present + bounds), log)
    window = len(steps) // 40
    parts = [axes.frame()]
    for i, (one, values) in enumerate(zip(series, usable)):
        style = f"s{colour_of(one, i)} d{one.dash % 4}"
        if window > 1 and not log:
            parts.append(_path(axes, steps, values, f"line faint {style}"))
            values = smooth(values, window)
        parts.append(_path(axes, steps, values, f"line {style}"))
    return "".join(parts)


def colour_of(series: Series, place: int) -> int:
    return (place if series.colour is None else series.colour) % len(COLOURS_LIGHT)


def area_chart(steps: list[int], series: list[Series]) -> str:
    """The inside of an SVG: the series stacked, the first at the bottom; a missing value counts as 0."""
    steps, series = thin(steps, series)
    totals = [sum(s.values[i] or 0.0 for s in series) for i in range(len(steps))]
    if not series or max(totals) <= 0:
        return ""
    axes = Axes(steps, 0.0, max(totals), log=False)
    parts, below = [axes.frame()], [0.0] * len(steps)
    for i, one in enumerate(series):
        above = [b + (v or 0.0) for b, v in zip(below, one.values)]
        edge = [f"{axes.x(s):.1f},{axes.y(v):.1f}" for s, v in zip(steps, above)]
        back = [f"{axes.x(s):.1f},{axes.y(v):.1f}" for s, v in zip(reversed(steps), reversed(below))]
        parts.append(f'<polygon class="area f{i}" points="{" ".join(edge + back)}"/>')
        below = above
    return "".join(parts)


def heat_map(steps: list[int], rows: list[list[float]]) -> str:
    """The inside of an SVG: rows[step][layer], steps to the right, layers upwards; the darker a cell, the further below
    1.

    Neighbouring steps (layers) are averaged into at most HEAT_COLUMNS
    (HEAT_ROWS) cells. The scale goes from 1 to the lowest cell.
    """
    columns = _blocks(len(rows), HEAT_COLUMNS)
    layers = _blocks(len(rows[0]), HEAT_ROWS)
    cells = [
        [sum(sum(row[b]) for row in rows[a]) / ((a.stop - a.start) * (b.stop - b.start)) for b in layers]
        for a in columns
    ]
    lowest = min(min(column) for column in cells)
    axes = Axes(steps, 0.0, float(len(rows[0])), log=False)
    wide, tall = (WIDTH - LEFT - RIGHT) / len(columns), (HEIGHT - TOP - BOTTOM) / len(layers)
    levels: list[list[str]] = [[] for _ in range(HEAT_LEVELS + 1)]
    for x, column in enumerate(cells):
        for y, value in enumerate(column):
            level = math.ceil((1 - value) / (1 - lowest) * HEAT_LEVELS - 1e-9) if value < 1 else 0
            at = f"M{LEFT + x * wide:.1f} {HEIGHT - BOTTOM - (y + 1) * tall:.1f}h{wide:.1f}v{tall:.1f}h-{wide:.1f}z"
            levels[level].append(at)
    parts = [axes.frame()]
    for level, paths in enumerate(levels):
        if paths and level:
            parts.append(f'<path class="heat" fill-opacity="{level / HEAT_LEVELS:.2f}" d="{"".join(paths)}"/>')
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{TOP + 10}" text-anchor="end">darkest: {label(lowest, 1e-4)}</text>'
    )
    return "".join(parts)


def _blocks(count: int, most: int) -> list[slice]:
    size = -(-count // most)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _path(axes: Axes, steps: list[int], values: list[float | None], classes: str) -> str:
    """A line through the values that are there; where they are few, with a dot on each."""
    points = [(axes.x(step), axes.y(value)) for step, value in zip(steps, values) if value is not None]
    dots = (
        "".join(f'<circle class="{classes}" cx="{x:.1f}" cy="{y:.1f}" r="1.5"/>' for x, y in points)
        if len(points) <= 12
        else ""
    )
    return f'<polyline class="{classes}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>{dots}'


def text_curve(
    steps: list[int], values: list[float | None], *, width: int = 64, height: int = 12, mark: str = "•"
) -> str:
    """A learning curve for a terminal: mean value a column, step numbers below. Empty without values."""
    points = [(s, v) for s, v in zip(steps, values) if v is not None]
    if not points:
        return ""
    low, high = min(v for _, v in points), max(v for _, v in points)
    low, high = min(low, 0.0), max(high, low + 1e-9)
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        columns[round((step - first) / (last - first) * (width - 1))].append(value)
    rows = [[" "] * width for _ in range(height)]
    for x, column in enumerate(columns):
        if column:
            rows[round((high - sum(column) / len(column)) / (high - low) * (height - 1))][x] = mark
    lines = [f"{high - (high - low) * y / (height - 1):>8.3f} |{''.join(row)}".rstrip() for y, row in enumerate(rows)]
    lines.append(" " * 9 + "+" + "-" * width)
    lines.append(" " * 10 + f"{first}".ljust(width - len(str(last))) + f"{last}")
    return "\n".join(lines)
