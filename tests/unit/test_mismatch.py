"""The mismatch report: its figures, its table, and its page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarl.report.mismatch import (
    BINS,
    Compared,
    Pass,
    figures,
    histogram,
    render,
    table,
    text_table,
    verdict,
    worst_tokens,
)
from tests.html_page import Page


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
        "quantize": "int4",
        "precision": "bfloat16",
        "replay": "R3",
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
    figures_at = lines.index("") + 1
    assert "live routing" in lines[figures_at] and "routes replayed" in lines[figures_at]
    assert len({len(line) for line in lines[figures_at:]}) == 1
    text = render(report, responses, Path())
    page = Page(text)
    assert "&lt;&amp;a<mark>b</mark>" in text and "runs/&lt;tiny&gt;" in text and text.count("<mark>") == 3
    assert not [tag for tag, attrs in page.tags if tag in ("link", "img") or "src" in attrs]
    assert [chart["kind"] for chart in page.data["charts"]] == ["stairs", "line"]


def test_fault_22_compare_gives_a_verdict_on_the_pass_that_a_run_would_take() -> None:
    report = report_of(compared())
    lines = text_table(report).splitlines()
    assert lines[1].startswith(
        "verdict: out of line: k3 0.0355, of which bfloat16 bears 0.005; replaying routes takes 71%"
    )
    assert (
        lines[2].startswith("  k3 0.0355 (above 0.005): ")
        and "docs/stability.md#1-are-the-engines-the-same" in lines[2]
    )
    heading, findings = verdict(report | {"replay": "none"})
    assert heading.startswith("out of line: k3 0.123") and [f.rule.key for f in findings] == [
        "mismatch/kl_k3",
        "routing/agree_rollout_old",
    ]
    sound = {**report, "precision": "low", "replay": "none", "live": report["live"] | {"mismatch/kl_k3": 0.02}}
    sound["live"]["routing/agree_rollout_old"] = 0.9
    assert verdict(sound)[0].startswith("healthy: k3 0.02, of which low precision bears 0.1")
    assert "Healthy: k3" in Page(render(sound, compared(), Path())).text


def test_without_routes_there_is_one_column_and_no_routing() -> None:
    responses = compared(routes=False)
    report = report_of(responses)
    assert report["replayed"] is None and all(len(values) == 1 and "rout" not in name for name, values in table(report))
    page = Page(render(report, responses, Path()))
    assert len(page.data["charts"]) == 1 and "routes replayed" not in page.words


def test_the_histogram_counts_every_token_once() -> None:
    chart = histogram({"live": np.array([-1.0, 0.0, 0.0, 1.0]), "replayed": np.zeros(4)})
    live, replayed = chart.lines
    assert chart.x is not None and len(chart.x) == len(live.values) == BINS + 1 and chart.x[0] == -1 == -chart.x[-1]
    assert [value for value in live.values[:-1] if value] == [1, 2, 1] and sum(v or 0 for v in replayed.values) == 4
    assert replayed.values[BINS // 2] == 4 and chart.log
    assert histogram({"live": np.zeros(3)}).data()  # two engines that agree to the last bit
