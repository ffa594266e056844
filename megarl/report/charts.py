"""Charts as data: what megarl/report/assets/page.js draws, from the rows of one run or of several."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from megarl.observe.catalog import METRICS
from megarl.report.panels import GROUPS, Group, Panel
from megarl.report.thresholds import RULES, Precision
from megarl.report.verdict import Rows, Values, column, number, show

MAX_POINTS = 1000  # of a line; neighbours are joined beyond
HEAT_COLUMNS, HEAT_ROWS = 200, 48
KNOWN = {key for group in GROUPS for panel in group.panels for key in panel.keys}


@dataclass(frozen=True)
class Line:
    """values: one a point of the x axis. run: which run's, where several are overlaid. dash: a pattern a metric."""

    name: str
    values: Values
    colour: int
    dash: int = 0
    run: int | None = None


@dataclass(frozen=True)
class Chart:
    """x: None for the steps of the page. rows: a heat map's [step][layer]. limits: (level, bad side, words)."""

    title: str
    keys: list[str]
    kind: Literal["line", "area", "heat", "stairs"] = "line"
    lines: list[Line] = field(default_factory=list)
    x: list[float] | None = None
    x_name: str = "step"
    log: bool = False
    low: float | None = None
    high: float | None = None
    rows: list[list[float]] = field(default_factory=list)
    limits: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The id of its figure."""
        return anchor(self.keys[0]) if self.keys else re.sub(r"\W+", "-", self.title.lower())

    @property
    def zero(self) -> bool:
        """Whether it shows nothing but zeros."""
        return self.kind != "heat" and not any(value for line in self.lines for value in line.values)

    def data(self) -> dict[str, Any]:
        """What the script reads, five digits a number."""
        return {
            "kind": self.kind,
            "x": self.x,
            "xName": self.x_name,
            "log": self.log,
            "low": self.low,
            "high": self.high,
            "limits": [(level, side) for level, side, _ in self.limits],
            "rows": [[_short(value) for value in row] for row in self.rows],
            "lines": [
                {
                    "name": line.name,
                    "run": line.run,
                    "colour": line.colour,
                    "dash": line.dash,
                    "values": [_short(value) for value in line.values],
                }
                for line in self.lines
            ],
        }


@dataclass(frozen=True)
class Run:
    """What a report knows of a run: its folder, its rows, its config.yaml as a tree and as text (empty without one)."""

    folder: Path
    name: str
    rows: Rows
    config: dict[str, Any]
    config_text: str
    precision: Precision


def anchor(key: str) -> str:
    return key.replace("/", "-").replace("_", "-")


def figure(chart: Chart, place: int) -> str:
    """Its frame in the page: title, keys, and where page.js puts legend and curves. place: of its data in the page."""
    help_text = "\n".join(f"{key}: {METRICS[key].meaning}" for key in chart.keys if key in METRICS)
    keys = " ".join(f"<code>{escape(key)}</code>" for key in chart.keys)
    notes = "; ".join(words for _, _, words in chart.limits)
    return (
        f'<figure id="{escape(chart.name)}" data-chart="{place}"><figcaption title="{escape(help_text)}">'
        f'<b>{escape(chart.title)}</b><span class="where"></span><span class="metrics">{keys}</span></figcaption>'
        f'<div class="keys"></div><div class="plot" role="img" aria-label="{escape(chart.title)}"></div>'
        f'<p class="note"><span class="limits">{escape(f"out of line: {notes}" if notes else "")}</span>'
        '<span class="beyond"></span></p></figure>'
    )


def run_charts(runs: list[Run]) -> tuple[list[int], list[tuple[Group, list[Chart]]]]:
    """(steps, the groups with the charts that have something to show). Several runs share the steps of all of them."""
    steps = sorted({row["step"] for run in runs for row in run.rows})
    by_step = [{row["step"]: row for row in run.rows} for run in runs]
    aligned = [[rows.get(step, {}) for step in steps] for rows in by_step]
    size = -(-len(steps) // MAX_POINTS)
    groups = []
    for group in [*GROUPS, _others(runs)]:
        charts = [chart for panel in group.panels if (chart := _chart(panel, runs, aligned, steps)) is not None]
        if charts:
            groups.append((group, [_thin(chart, size) for chart in charts]))
    return steps[size - 1 :: size] + ([steps[-1]] if len(steps) % size else []), groups


def _others(runs: list[Run]) -> Group:
    """Numbers that no panel knows: another version's, or a metric of the user's."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    unknown = [key for key in keys if "/" in key and key not in KNOWN and key not in METRICS]
    return Group("Others", "Metrics that this version does not know.", [Panel(key, {key: "value"}) for key in unknown])


def _chart(panel: Panel, runs: list[Run], aligned: list[Rows], steps: list[int]) -> Chart | None:
    if panel.kind == "heat":
        return _heat(panel, aligned[0], steps) if len(runs) == 1 else None
    keys, kind = panel.keys, panel.kind
    if kind == "area" and len(runs) > 1 and panel.total:
        keys, kind = {panel.total: "whole step"}, "line"
    lines = [
        Line(
            ", ".join([run.name] * (len(runs) > 1) + [text] * (len(keys) > 1 or len(runs) == 1)),
            _with_gaps(key, rows),
            *((i, dash, i) if len(runs) > 1 else (0, 0, None)),
        )
        for i, (run, rows) in enumerate(zip(runs, aligned, strict=True))
        for dash, (key, text) in enumerate(keys.items())
    ]
    lines = [line for line in lines if any(value is not None for value in line.values)]
    if not lines:
        return None
    if len(runs) == 1:
        lines = [replace(line, colour=place) for place, line in enumerate(lines)]
    shown = [key for key in keys if key != "time/other_s" and any(key in row for rows in aligned for row in rows)]
    first, *others = [_limits(keys, precision) for precision in {run.precision for run in runs}]
    limits = [limit for limit in first if all(limit in other for other in others)]
    return Chart(panel.title, shown, kind, lines, log=panel.log, low=panel.low, high=panel.high, limits=limits)


def _with_gaps(key: str, rows: Rows) -> Values:
    """A column; without the tokens a second of a step that had no update, which older versions wrote."""
    if key != "throughput/train_tokens_per_s":
        return column(rows, key)
    return [number(row.get(key)) if row.get("optim/grad_norm") is not None else None for row in rows]


def _limits(keys: dict[str, str], precision: Precision) -> list[tuple[float, str, str]]:
    """The levels of this chart's metrics, each once; in words that name the curve where not all have the same."""
    rules = [rule for rule in RULES if rule.key in keys and rule.kind in ("above", "below", "rising")]
    words_of_limit: dict[tuple[float, str], dict[str, str]] = {}
    for rule in rules:
        level, side = rule.level_at(precision), "below" if rule.kind == "below" else "above"
        words = f"{side} {show(level)}{' and rising' if rule.kind == 'rising' else ''}"
        words_of_limit.setdefault((level, side), {})[rule.key] = words
    return [
        (level, side, next(iter(words.values())) if len(words) == len(keys) else _named(words, keys))
        for (level, side), words in words_of_limit.items()
    ]


def _named(words: dict[str, str], keys: dict[str, str]) -> str:
    return ", ".join(f"{keys[key]} {text}" for key, text in words.items())


def _heat(panel: Panel, rows: Rows, steps: list[int]) -> Chart | None:
    """Neighbouring steps and layers averaged into cells. A step without values is left out."""
    (key,) = panel.keys
    known = [
        (step, [number(value) for value in values])
        for step, row in zip(steps, rows, strict=True)
        if isinstance(values := row.get(key), list)
    ]
    layers = max((len(values) for _, values in known), default=0)
    whole = [(step, values) for step, values in known if len(values) == layers and None not in values]
    if not whole or not layers:
        return None
    down, across = -(-len(whole) // HEAT_COLUMNS), -(-layers // HEAT_ROWS)
    blocks = [whole[i : i + down] for i in range(0, len(whole), down)]
    cells = [
        [
            sum(sum(v or 0.0 for v in values[j : j + across]) for _, values in block)
            / (len(block) * len(block[0][1][j : j + across]))
            for j in range(0, layers, across)
        ]
        for block in blocks
    ]
    return Chart(panel.title, [key], "heat", x=[float(block[-1][0]) for block in blocks], rows=cells)


def _thin(chart: Chart, size: int) -> Chart:
    """`size` neighbours joined in one point: their mean, or of a maximum the maximum."""
    if size <= 1 or chart.kind == "heat":
        return chart
    join = _largest if all(key.endswith(("_max", "worst_gap")) for key in chart.keys) else _mean
    return replace(
        chart,
        lines=[
            replace(line, values=[join(line.values[i : i + size]) for i in range(0, len(line.values), size)])
            for line in chart.lines
        ],
    )


def _mean(values: Values) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _largest(values: Values) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def as_json(value: Any) -> str:
    """For a <script> element: nothing in it ends the element, and no NaN, which JSON does not have."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
