"""Curves where no script runs: pictures of a README, as SVG coloured by CSS variables, and a line for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 8, 24
MAX_POINTS = 400

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


def colours(selector: str) -> str:
    """The colours of charts and pages as CSS variables of `selector`, for a light and for a dark background."""
    light = "--ink:#1d1c1a;--soft:#6d6a63;--rule:#e3e1db;--paper:#fff;" + "".join(
        f"--c{i}:{c};" for i, c in enumerate(COLOURS_LIGHT)
    )
    dark = "--ink:#eceae6;--soft:#a9a59c;--rule:#3a3935;--paper:#1c1b19;" + "".join(
        f"--c{i}:{c};" for i, c in enumerate(COLOURS_DARK)
    )
    return f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


def css(selector: str) -> str:
    """The style of a picture: its colours, as rules on `selector`, and its lines."""
    lines = "".join(f".s{i}{{stroke:var(--c{i})}}" for i in range(len(COLOURS_LIGHT)))
    return (
        f"{colours(selector)}{lines}"
        ".line{fill:none;stroke-width:1.6;stroke-linejoin:round}.faint{opacity:.28;stroke-width:1}"
        ".d1{stroke-dasharray:5 3}.d2{stroke-dasharray:1.5 2.5}.d3{stroke-dasharray:7 2 1.5 2}"
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
        scaled = math.log10(value) if self.log else value
        return TOP + (self.high - scaled) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

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
        for tick in range(-(-self.first // step) * step, self.last + 1, step):
            parts.append(
                f'<text class="tick" x="{self.x(tick):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{tick}</text>'
            )
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
    for i, (curve, values) in enumerate(zip(series, usable, strict=True)):
        style = f"s{colour_of(curve, i)} d{curve.dash % 4}"
        if window > 1 and not log:
            parts.append(_path(axes, steps, values, f"line faint {style}"))
            values = smooth(values, window)
        parts.append(_path(axes, steps, values, f"line {style}"))
    return "".join(parts)


def learning_curve_svg(rows: list[dict[str, Any]]) -> str:
    """The reward as a picture that stands alone, light or dark as the reader's page is."""
    steps, values = [row["step"] for row in rows], [row.get("reward/mean") for row in rows]
    inside = line_chart(steps, [Series("reward", values)], low=0.0, high=1.0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 18}" width="{2 * WIDTH}" role="img">'
        f"<title>Mean reward by step</title><style>{css('svg')}</style>"
        f'<text class="tick" x="{LEFT}" y="13">mean reward by step</text>'
        f'<g transform="translate(0 16)">{inside}</g></svg>\n'
    )


def colour_of(series: Series, place: int) -> int:
    return (place if series.colour is None else series.colour) % len(COLOURS_LIGHT)


def _path(axes: Axes, steps: list[int], values: list[float | None], classes: str) -> str:
    """A line through the values that are there; where they are few, with a dot on each."""
    points = [(axes.x(step), axes.y(value)) for step, value in zip(steps, values, strict=True) if value is not None]
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
    points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    if not points:
        return ""
    low, high = min(v for _, v in points), max(v for _, v in points)
    low, high = min(low, 0.0), max(high, low + max(1e-9, abs(low) * 1e-6))
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
