"""The mismatch report: its figures, its table, and its page."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from megarl.report.mismatch import BINS, Compared, Pass, figures, histogram, render, table, text_table, worst_tokens


def decode(tokens: list[int]) -> str:
    return "".join("<&ab"[token] for token in tokens)


def compared(routes: bool = True) -> list[Compared]:
    """Two responses, of 2 and 1 tokens, over 2 MoE layers, top-2 of 4:
    one layer of one token differs when routing is live.
    """
    rollout = np.array([[[0, 1], [2, 3]], [[1, 0], [0, 2]], [[3, 2], [1, 2]]], np.uint8)
    own = np.array(
        [[[0, 1], [0, 3]], [[3, 2], [2, 1]]], np.int16
    )  # of the rows that predict; sets, not rows, are compared
    gap = np.array([[0.0, 0.25], [0.0, 0.0]], np.float32)
    first = Compared(
        tokens=[0, 1, 2, 3],
        prompt_len=2,
        rollout=np.array([-1.0, -2.0], np.float32),
        routes=rollout if routes else None,
        live=Pass(np.array([-1.0, -3.0], np.float32), *((own, gap) if routes else ())),
        replayed=Pass(np.array([-1.0, -2.5], np.float32), rollout[1:].astype(np.int16), 0 * gap) if routes else None,
    )
    own, gap = rollout[:1].astype(np.int16), np.zeros((1, 2), np.float32)
    one = Pass(np.array([-0.5], np.float32), *((own, gap) if routes else ()))
    second = Compared(
        [2, 3], 1, np.array([-0.5], np.float32), rollout[:1] if routes else None, one, one if routes else None
    )
    return [first, second]


def report_of(responses: list[Compared]) -> dict[str, Any]:
    return {
        "model": "runs/<tiny>",
        "layout": "tp 1, dp 1",
        "engine_dtype": "float32",
        "rollout_dtype": "bfloat16",
        "temperature": 1.0,
        "prompts": 2,
        "responses": 2,
        "tokens": 3,
        "live": figures(responses, "live", 5.0),
        "replayed": figures(responses, "replayed", 5.0),
        "worst": worst_tokens(responses, decode),
    }


def test_figures_of_a_known_mismatch() -> None:
    found = figures(compared(), "live", 5.0)
    assert found is not None
    assert found["mismatch/kl_k1"] == pytest.approx(1 / 3)
    assert found["mismatch/kl_k3"] == pytest.approx(math.exp(-1) / 3)
    assert found["mismatch/ratio_mean"] == pytest.approx((2 + math.exp(-1)) / 3)
    assert found["mismatch/abs_logprob_diff_max"] == 1.0 and found["mismatch/extreme_frac_2"] == pytest.approx(1 / 3)
    assert found["routing/layer_agreement"] == pytest.approx([1.0, 2.5 / 3])
    assert found["routing/agree_rollout_old"] == pytest.approx(5.5 / 6)
    assert found["routing/any_layer_differs_frac"] == pytest.approx(1 / 3)
    assert found["routing/worst_gap"] == found["routing/gap_median"] == 0.25
    replayed = figures(compared(), "replayed", 5.0)
    assert (
        replayed is not None and replayed["routing/agree_rollout_old"] == 1.0 and replayed["routing/gap_median"] is None
    )


def test_worst_tokens_come_first_in_their_text() -> None:
    worst = worst_tokens(compared(), decode, count=2)
    assert [(row["response"], row["position"]) for row in worst] == [(0, 1), (0, 0)]
    assert (worst[0]["before"], worst[0]["token"], worst[0]["after"]) == ("<&a", "b", "")
    assert (worst[0]["rollout"], worst[0]["live"], worst[0]["replayed"]) == (-2.0, -3.0, -2.5)
    assert worst[0]["layers_live"] == [] and worst[1]["layers_live"] == [1] and worst[1]["layers_replayed"] == []


def test_the_table_and_the_page() -> None:
    responses = compared()
    report = report_of(responses)
    assert ("KL(mu, pi), k1", ["3.333e-01", "1.667e-01"]) in table(report)
    assert ("score gap of a difference, median", ["2.50e-01", "-"]) in table(report)
    lines = text_table(report).splitlines()
    assert "live routing" in lines[2] and "routes replayed" in lines[2] and len({len(line) for line in lines[2:]}) == 1
    page = render(report, responses)
    assert "&lt;&amp;a<mark>b</mark>" in page and "runs/&lt;tiny&gt;" in page and page.count("<mark>") == 3
    assert not re.search(r"(src|href)=|url\(|@import|<script src|<link", page)
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) == 2 and all(ElementTree.fromstring(chart) is not None for chart in charts)
    assert balanced(page)


def test_without_routes_there_is_one_column_and_no_routing() -> None:
    responses = compared(routes=False)
    report = report_of(responses)
    assert report["replayed"] is None and all(len(values) == 1 and "rout" not in name for name, values in table(report))
    page = render(report, responses)
    assert page.count("<svg") == 1 and "replayed" not in page.split("</style>")[1] and balanced(page)


def test_the_histogram_counts_every_token_once() -> None:
    chart = histogram([np.array([-1.0, 0.0, 0.0, 1.0]), np.zeros(4)])
    lines = re.findall(r'<polyline class="line s(\d)" points="([^"]*)"', chart)
    assert [name for name, _ in lines] == ["0", "1"] and all(len(points.split()) == 2 * BINS + 2 for _, points in lines)
    tops = [{float(point.split(",")[1]) for point in points.split()} for _, points in lines]
    assert len(tops[0]) == 3 and len(tops[1]) == 2  # bins of 0, 1 and 2 tokens; bins of 0 and 4
    assert histogram([np.zeros(3)])  # two engines that agree to the last bit


def balanced(page: str) -> bool:
    """Every tag that opens closes, in order."""
    opened: list[str] = []
    wrong: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "line", "br"):
                opened.append(tag)

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            if not opened or opened.pop() != tag:
                wrong.append(tag)

    Tags().feed(page)
    return not opened and not wrong
