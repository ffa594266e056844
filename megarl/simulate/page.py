"""What a simulated rank recorded, as one page in the style of a run's report: memory over the step, and its tables."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from megarl.report.charts import Chart, Line, figure
from megarl.report.html import write
from megarl.report.page import page, table_of, tiles
from megarl.simulate.phases import BUILD, STEP

GIB = 2**30


def write_page(
    path: Path, config: str, found: dict[str, Any], tables: dict[str, list[tuple[str, str]]], fits: str
) -> None:
    """config: its path. tables: title -> (figure, what it is of), in their order. fits: the verdict, in words."""
    chart = memory_chart(found["curve"])
    name = f"{Path(config).name}, rank {found['rank']} of {found['world']:,}"
    peak = max(at["bytes"] for at in found["peaks"].values())
    body = (
        f"<h1>{escape(name)}</h1><p>A batch of {found['minibatches']} mini-batches of {found['packs']} packs on a "
        "simulated GPU: nothing has run on one, and fragmentation is not in it.</p>"
        + tiles(
            [
                ("peak, GiB", f"{peak / GIB:.3f}"),
                ("with a checkpoint and a weight sync", fits),
                ("simulated in, s", f"{found['seconds']:.0f}"),
            ]
        )
        + figure(chart, 0)
        + "".join(
            f"<h2>{escape(title)}</h2>{table_of(['', ''], [list(row) for row in rows], 'figures')}"
            for title, rows in tables.items()
        )
    )
    write(path, page(name, body, {"steps": [], "charts": [chart.data()], "runs": [], "samples": []}))


def memory_chart(curve: list[list[Any]]) -> Chart:
    """A line a phase, over the allocations and frees of the whole. curve: [phase, event, bytes]."""
    phases = [phase for phase in (*BUILD, "packs", *STEP) if any(at[0] == phase for at in curve)]
    lines = [
        Line(phase, [at[2] / GIB if at[0] == phase else None for at in curve], place)
        for place, phase in enumerate(phases)
    ]
    x = [float(at[1]) for at in curve]
    return Chart("Memory, GiB", [], "line", lines, x=x, x_name="allocations and frees", low=0.0)
