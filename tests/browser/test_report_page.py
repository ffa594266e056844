"""The report in a real headless Chromium: light and dark, on a desk and on a phone, one run, three overlaid, one that
collapsed; nothing is fetched, nothing sticks out, and pointing, zooming, hiding and searching work.

MEGARL_PICTURES=FOLDER keeps a PNG of every case there.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import chromium
import pytest

from megarl.report.html import report
from tests.synthetic_runs import write_run
from tests.unit.test_mismatch import compared, report_of

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="no Chromium on PATH; on Debian or Ubuntu: apt-get install chromium"
)

# What is read off the page once it stands: sizes in CSS pixels, colours as Chromium computes them. A curve is blank if no pixel of its canvas
# has the colour of a line.
LOOK = """(() => {
  const wide = document.documentElement.clientWidth, page = getComputedStyle(document.body);
  const figures = [...document.querySelectorAll('figure')].filter(f => !f.closest('details:not([open])'));
  const out = [...document.querySelectorAll('figure,h1,h2,.tile,.scroll,pre,.verdict,.sample,.find,.keys,canvas,figcaption code')]
    .filter(e => !e.closest('details:not([open]) > .grid') && e.getBoundingClientRect().right > wide + 1);
  const hex = [0, 1, 2, 3].map(i => getComputedStyle(document.documentElement).getPropertyValue('--c' + i).trim());
  const colours = hex.map(c => c.slice(1).match(/../g).map(h => parseInt(h, 16)));
  const blank = figures.filter(f => {
    const c = f.querySelector('canvas');
    if (!c) return true;
    const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    for (let i = 0; i < d.length; i += 4)
      if (d[i + 3] > 60 && colours.some(k => k.every((v, j) => Math.abs(v - d[i + j]) < 60))) return false;
    return true;
  });
  return {wide, scroll: document.documentElement.scrollWidth, out: out.map(e => e.className || e.tagName), figures: figures.length,
          blank: blank.map(f => f.id), narrowest: Math.min(...figures.map(f => f.getBoundingClientRect().width)),
          stroke: hex[0], paper: page.backgroundColor, ink: page.color,
          soft: getComputedStyle(document.querySelector('p')).color, samples: document.querySelectorAll('.sample').length};
})()"""

# The pointer on the middle of the first chart: its legend, and the same step in another chart.
POINT = """(() => {
  const f = document.querySelector('figure[data-chart]'), over = f.querySelector('.u-over'), box = over.getBoundingClientRect();
  over.dispatchEvent(new MouseEvent('mousemove', {clientX: box.left + box.width / 2, clientY: box.top + 50, bubbles: true}));
  return new Promise(done => setTimeout(() => done([f.querySelector('.where').textContent, f.querySelector('.keys b').textContent,
    document.querySelector('#policy-entropy .where').textContent]), 100));
})()"""

# Dragging over the left half of the first chart zooms it and every other chart; a double click undoes it.
ZOOM = """(async () => {
  const chart = id => document.getElementById(id).chart.plot, wait = () => new Promise(done => setTimeout(done, 150));
  const over = document.querySelector('#reward-mean .u-over'), box = over.getBoundingClientRect();
  const send = (kind, share) => over.dispatchEvent(new MouseEvent(kind, {clientX: box.left + share * box.width, clientY: box.top + 40, bubbles: true, button: 0, detail: 1, movementX: 5}));
  const ends = () => ['reward-mean', 'policy-entropy'].map(id => Math.round(chart(id).scales.x.max));
  const before = ends();
  send('mousemove', 0.02); send('mousedown', 0.02); send('mousemove', 0.5); send('mouseup', 0.5); await wait();
  const zoomed = ends();
  over.dispatchEvent(new MouseEvent('dblclick', {bubbles: true})); await wait();
  return [before, zoomed, ends()];
})()"""

HIDE = """(async () => {
  const line = () => document.getElementById('reward-mean').chart.plot.series.filter(s => s.show).length;
  const before = line();
  document.querySelector('#runs button').click();
  const after = line();
  document.querySelector('#runs button').click();
  return [before, after, line()];
})()"""

SEARCH = """(() => {
  const box = document.querySelector('.find input'), shown = () => document.querySelectorAll('.sample').length, all = shown();
  const wanted = document.querySelector('.sample pre').textContent.slice(-7);
  const set = (e, v) => { e.value = v; e.dispatchEvent(new Event('input')); };
  set(box, wanted.toUpperCase());
  const found = shown();
  set(box, 'no such text');
  const none = shown();
  set(box, '');
  const [which, order] = document.querySelectorAll('.find select');
  set(which, 'good');
  const good = [...document.querySelectorAll('.sample header b')].map(b => b.textContent);
  set(which, 'all'); set(order, 'low');
  const first = document.querySelector('.sample header b').textContent;
  const shaded = [...document.querySelectorAll('.sample .tokens span')].filter(s => s.style.background).length;
  return {all, found, none, good: [...new Set(good)], first, shaded, title: document.querySelector('.sample .tokens span').title};
})()"""

# A chart that is folded away is drawn when its fold is opened.
UNFOLD = """(async () => {
  const fold = document.querySelector('details.zero'), before = fold.querySelectorAll('canvas').length;
  fold.open = true;
  await new Promise(done => setTimeout(done, 200));
  return [before, fold.querySelectorAll('canvas').length, fold.querySelectorAll('figure').length];
})()"""

# One spike among hundred values does not flatten the axis; a limit near by is shown, one far away is not.
AXES = """(() => {
  const noise = [...Array(100).keys()].map(i => 1 + (i % 10) / 10);
  const few = axisRange([1, 1000, 2]), spiked = axisRange([...noise, 1e6]), step = axisRange([...Array(50).fill(0), ...Array(50).fill(9)]);
  return {spiked, few: few.max, step: [step.beyond, step.max], near: axisRange(noise, {limits: [3]}).max, far: axisRange(noise, {limits: [300]}).max,
          flat: axisRange([5, 5]), zero: axisRange([0, 0]), none: axisRange([]), log: axisRange([-13, -12.9], {log: true}),
          ticks: logTicks(-12.2, -3.8).length, short: logTicks(-0.5, 0.4), shown: [show(1.23456e-13), show(4e-4), show(0.83124), show(1e-3), show(12345.6)]};
})()"""


def luminance(colour: str) -> float:
    """Relative luminance of 'rgb(r, g, b)' or '#rrggbb', WCAG 2.2."""
    if colour.startswith("#"):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    else:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


CASES = [
    ("one", 1280, "light"),
    ("one", 360, "dark"),
    ("collapsed", 1280, "dark"),
    ("collapsed", 360, "light"),
    ("overlay", 360, "light"),
    ("overlay", 1280, "dark"),
    ("short", 700, "light"),
    ("compare", 360, "dark"),
]
Seen = dict[Any, Any]


async def look(pages: dict[str, Path]) -> Seen:
    """Every case in one browser."""
    assert EXECUTABLE is not None
    found: Seen = {}
    async with chromium.browser(EXECUTABLE) as tab:
        for kind, width, scheme in CASES:
            await tab.open(pages[kind], width, 900, scheme)
            found[kind, width, scheme] = await tab.evaluate(LOOK)
            if pictures := os.environ.get("MEGARL_PICTURES"):
                await tab.screenshot(Path(pictures) / f"{kind}_{width}_{scheme}.png")
        await tab.open(pages["one"], 1280, 900, "light")
        for name, script in (("point", POINT), ("zoom", ZOOM), ("search", SEARCH), ("unfold", UNFOLD), ("axes", AXES)):
            found[name] = await tab.evaluate(script)
        await tab.open(pages["overlay"], 1280, 900, "light")
        found["hide"] = await tab.evaluate(HIDE)
        assert tab.problems == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    from megarl.report.mismatch import render

    folder = tmp_path_factory.mktemp("report")
    runs = {
        "one": write_run(folder / "a_sound_run", steps=120),
        "collapsed": write_run(folder / "collapsed", precision="int4", minibatches=8, collapse_at=120, of=400, seed=1),
        "short": write_run(folder / "short", steps=1, of=80),
        "fp32": write_run(folder / ("long_name_" * 6), precision="float32", minibatches=1, seed=2),
    }
    pages = {name: folder / f"{name}.html" for name in (*runs, "overlay", "compare")}
    for name, run in runs.items():
        report([str(run)], out=str(pages[name]))
    report([str(runs[name]) for name in ("one", "collapsed", "fp32")], out=str(pages["overlay"]))
    responses = compared()
    pages["compare"].write_text(render(report_of(responses), responses, folder), "utf-8")
    return asyncio.run(look(pages))


@pytest.mark.parametrize("case", CASES)
def test_the_page_as_a_reader_sees_it(seen: Seen, case: tuple[str, int, str]) -> None:
    kind, width, scheme = case
    found = seen[case]
    assert width - 20 <= found["wide"] <= width  # less a scroll bar
    assert found["scroll"] <= found["wide"] and found["out"] == [], found
    assert found["blank"] == [] and found["narrowest"] >= 300
    assert found["figures"] >= (2 if kind == "compare" else 20)
    assert (found["samples"] > 0) == (kind in ("one", "collapsed"))
    assert (luminance(found["paper"]) < 0.1) == (scheme == "dark")
    assert contrast(found["paper"], found["ink"]) >= 7 and contrast(found["paper"], found["stroke"]) >= 3
    assert contrast(found["paper"], found["soft"]) >= 4.5


def test_the_pointer_shows_the_same_step_in_every_chart(seen: Seen) -> None:
    where, value, elsewhere = seen["point"]
    assert where == elsewhere and where.startswith("step ") and 50 <= int(where.removeprefix("step ")) <= 70
    assert 0 < float(value) < 1


def test_dragging_zooms_every_chart_and_a_double_click_undoes_it(seen: Seen) -> None:
    before, zoomed, after = seen["zoom"]
    assert before == after == [120, 120] and zoomed[0] == zoomed[1] and 50 <= zoomed[0] <= 70


def test_a_run_can_be_hidden_in_every_chart(seen: Seen) -> None:
    before, hidden, after = seen["hide"]
    assert hidden < before == after


def test_samples_are_searched_sorted_and_shaded(seen: Seen) -> None:
    found = seen["search"]
    assert found["all"] > found["found"] >= 1 and found["none"] == 0
    assert found["good"] == ["reward 1"] and found["first"] == "reward 0" and found["shaded"] > 0
    assert "log mu -" in found["title"] and "log pi_old - log mu" in found["title"]


def test_what_is_folded_away_is_drawn_when_it_is_opened(seen: Seen) -> None:
    before, after, figures = seen["unfold"]
    assert before == 0 and after == figures > 0


def test_fault_22_one_spike_does_not_flatten_an_axis(seen: Seen) -> None:
    axes = seen["axes"]
    assert axes["spiked"]["beyond"] == 1 and axes["spiked"]["max"] < 4 and axes["few"] > 1000
    assert axes["step"][0] == 0 and axes["step"][1] > 9
    assert axes["near"] >= 3 and axes["far"] < 3
    assert axes["flat"]["min"] < 5 < axes["flat"]["max"] and axes["zero"]["min"] <= 0 < axes["zero"]["max"]
    assert axes["none"]["max"] > axes["none"]["min"] and axes["log"]["max"] - axes["log"]["min"] > 0.5
    assert 3 <= axes["ticks"] <= 6 and len(axes["short"]) >= 2
    assert axes["shown"] == ["1.23e-13", "4e-4", "0.8312", "0.001", "12350"]
