"""One self-contained HTML page from megarl/report/assets: styles, scripts and data are in it, nothing is fetched."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from megarl.report.charts import as_json
from megarl.report.curves import colours
from megarl.report.thresholds import GUIDE
from megarl.report.verdict import Finding

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("uplot/uPlot.iife.min.js", "charts.js", "page.js")
STYLES = ("uplot/uPlot.min.css", "page.css")


def page(title: str, body: str, data: dict[str, Any]) -> str:
    """data: what page.js reads: steps, charts, runs, samples, and for a run that goes on `refresh`, in seconds."""
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        style="\n".join([colours(":root"), *map(_asset, STYLES)]),
        body=body,
        data=as_json(data),
        script="\n".join(map(_asset, SCRIPTS)),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text("utf-8")


def verdict_box(
    heading: str, findings: list[Finding], where: Path, charts: dict[str, str], *, folded: bool = False
) -> str:
    """What is out of line, what to change, and where that is explained; folded: under its heading, to be opened.

    where: the folder of the page. charts: metric key -> the id of the chart that shows it.
    """
    items = "".join(
        f"<li><b>{escape(finding.text)}</b> {_chart_link(finding.rule.key, charts)}<br>{escape(finding.rule.change)} "
        f"({guide_link(finding, where)})</li>"
        for finding in findings
    )
    kind, head = "bad" if findings else "good", f"<b>{escape(heading)}</b>"
    if not items:
        inside = head
    elif folded:
        inside = f"<details><summary>{head}</summary><ul>{items}</ul></details>"
    else:
        inside = f"{head}<ul>{items}</ul>"
    return f'<section class="verdict {kind}">{inside}</section>'


def _chart_link(key: str, charts: dict[str, str]) -> str:
    return f'<a href="#{charts[key]}"><code>{key}</code></a>' if key in charts else f"<code>{key}</code>"


def guide_link(finding: Finding, where: Path) -> str:
    """The section of docs/stability.md by name; a link where the page lies in a checkout that has it."""
    checkout, folder = Path(__file__).resolve().parents[2], where.resolve()
    if not (checkout / GUIDE).is_file() or not folder.is_relative_to(checkout):
        return escape(finding.link)
    path = os.path.relpath(checkout / GUIDE, folder)
    return f'<a href="{escape(path)}#{finding.rule.section}">{escape(finding.link)}</a>'


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def tiles(named: list[tuple[str, str]]) -> str:
    """(name, value) as tiles; one without a value is left out."""
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in named if value
    )
    return f'<div class="tiles">{cells}</div>'


def table_of(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Of plain texts; the first column names the row."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll {kind}"><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'


def token_table(rows: list[dict[str, Any]], names: list[str], cells: list[list[str]]) -> str:
    """Tokens in their text, each row with `before`, `token` and `after`, and beside it the named cells."""
    lines = []
    for row, values in zip(rows, cells, strict=True):
        before, token, after = (escape(str(row[part])).replace("\n", "↵") for part in ("before", "token", "after"))
        text = f"{before}<mark>{token or '&nbsp;'}</mark>{after}"
        lines.append(f'<tr><td class="text">{text}</td>{"".join(f"<td>{escape(v)}</td>" for v in values)}</tr>')
    head = "".join(f"<th>{name}</th>" for name in ["text", *names])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
