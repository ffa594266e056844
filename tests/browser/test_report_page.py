"""The report in a real headless Chromium: light and dark, on a desk and
on a phone; nothing is fetched, nothing sticks out.
"""

from __future__ import annotations

import asyncio
import math
import os
from pathlib import Path
from typing import Any

import chromium
import pytest

from megarl.observe.metrics import MetricsLogger
from megarl.observe.worst import write_worst
from megarl.report.html import report
from megarl.report.panels import GROUPS

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="no Chromium on PATH; on Debian or Ubuntu: apt-get install chromium"
)

STEPS, LAYERS = 60, 12

# What is read off the page once it stands: sizes in CSS pixels, colours as Chromium computes them.
LOOK = """(() => {
  const colour = (e, p) => getComputedStyle(e)[p], wide = document.documentElement.clientWidth;
  const out = [...document.querySelectorAll('figure,h1,h2,.tile,.scroll,pre')].filter(e => e.getBoundingClientRect().right > wide + 1);
  const lines = [...document.querySelectorAll('figure polyline.line')];
  return {wide, scroll: document.documentElement.scrollWidth, out: out.length, figures: document.querySelectorAll('figure').length,
          empty: lines.filter(e => e.getBBox().width === 0).length, heat: document.querySelectorAll('path.heat').length,
          narrowest: Math.min(...[...document.querySelectorAll('figure')].map(e => e.getBoundingClientRect().width)),
          marks: document.querySelectorAll('mark').length, stroke: colour(lines[0], 'stroke'),
          paper: colour(document.body, 'backgroundColor'), ink: colour(document.body, 'color')};
})()"""

# The pointer on the middle of the first chart shows each series' value there.
POINT = """(() => {
  const f = document.querySelector('figure[data-at]'), svg = f.querySelector('svg:not(.key)'), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top + 50}));
  return f.querySelector('.keys b').textContent;
})()"""


def make_run(folder: Path, scale: float) -> Path:
    """A run with every metric that has a panel, a name that must be escaped, and its worst tokens."""
    logger = MetricsLogger(folder)
    for step in range(1, STEPS + 1):
        row: dict[str, Any] = {"time/step_s": 4.0}
        for group in GROUPS:
            for panel in group.panels:
                row |= {
                    key: scale * (0.1 + 0.4 * (1 - math.exp(-step / 20))) for key in panel.keys if key != "time/other_s"
                }
        row["routing/layer_agreement"] = [1 - 0.002 * layer * step / STEPS for layer in range(LAYERS)]
        logger.log(step, row)
        token = {
            "difference": 0.1,
            "rollout": -1.0,
            "trainer": -1.1,
            "before": "3;<b>4</b>;" * 20,
            "token": "7",
            "after": ";\nend",
        }
        write_worst(folder, step, [token] * 4, str)
    logger.close()
    (folder / "config.yaml").write_text("run: {dir: " + "long/" * 60 + "}\n")
    return folder


def luminance(colour: str) -> float:
    """Relative luminance of 'rgb(r, g, b)', WCAG 2.2."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


CASES = [("one", 1280, "light"), ("one", 400, "dark"), ("overlay", 400, "light"), ("overlay", 1280, "dark")]


async def look(pages: dict[str, Path], pictures: bool) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Every case in one browser. pictures: also a PNG of each, beside the page."""
    assert EXECUTABLE is not None
    found = {}
    async with chromium.browser(EXECUTABLE) as tab:
        for kind, width, scheme in CASES:
            await tab.open(pages[kind], width, 900, scheme)
            found[kind, width, scheme] = await tab.evaluate(LOOK) | {"pointed": await tab.evaluate(POINT)}
            if pictures:
                await tab.screenshot(pages[kind].with_name(f"{kind}_{width}_{scheme}.png"))
        assert tab.problems == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("report")
    runs = [str(make_run(folder / name, scale)) for name, scale in (("first_run", 1.0), ("second_run", 0.8))]
    pages = {"one": folder / "one.html", "overlay": folder / "overlay.html"}
    report(runs[:1], out=str(pages["one"]))
    report(runs, out=str(pages["overlay"]))
    return asyncio.run(look(pages, pictures="MEGARL_PICTURES" in os.environ))


@pytest.mark.parametrize("case", CASES)
def test_the_page_as_a_reader_sees_it(
    seen: dict[tuple[str, int, str], dict[str, Any]], case: tuple[str, int, str]
) -> None:
    kind, width, scheme = case
    found = seen[case]
    assert width - 20 <= found["wide"] <= width  # less a scroll bar
    assert found["scroll"] <= found["wide"] and found["out"] == 0, found
    assert found["figures"] >= 20 and found["empty"] == 0 and found["narrowest"] >= 300
    assert (found["heat"] > 0) == (kind == "one") and (found["marks"] == 24) == (kind == "one")
    assert (luminance(found["paper"]) < 0.1) == (scheme == "dark")
    assert contrast(found["paper"], found["ink"]) >= 7 and contrast(found["paper"], found["stroke"]) >= 3
    assert " at " in found["pointed"]
