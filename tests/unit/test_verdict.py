"""What the report says of a run: on formulas, on the paper's runs, and the numbers in docs/stability.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megarl.observe.catalog import METRICS
from megarl.observe.metrics import read_metrics
from megarl.report.thresholds import LEAST_STEPS, PRECISIONS, RISING, RULES
from megarl.report.verdict import Verdict, judge, judge_figures, precision_of
from tests.synthetic_runs import write_run

DOCS = Path(__file__).parents[2] / "docs"


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    """Columns by the last part of a key that has a rule."""
    keys = {rule.key.split("/")[1]: rule.key for rule in RULES}
    named = {keys[name]: values for name, values in columns.items()}
    return [
        {"step": i + 1, **{key: values[i] for key, values in named.items()}}
        for i in range(len(next(iter(named.values()))))
    ]


def broken(verdict: Verdict) -> list[tuple[str, str]]:
    return [(finding.rule.key, finding.rule.kind) for finding in verdict.findings]


def test_fault_22_a_sound_run_is_healthy_and_a_collapsed_one_is_told_in_order(tmp_path: Path) -> None:
    sound = write_run(tmp_path / "sound")
    assert judge(read_metrics(sound), "bfloat16").lines == ["verdict: healthy"]
    verdict = judge(read_metrics(write_run(tmp_path / "collapsed", collapse_at=120)), "bfloat16")
    lines = verdict.lines
    assert lines[0] == "verdict: out of line, in the order to look at:" and len(lines) == 1 + len(verdict.findings)
    keys = [key for key, _ in broken(verdict)]
    assert keys[-1] == "reward/mean" and {"response/truncated_frac", "policy/entropy", "mismatch/kl_k3"} <= set(keys)
    assert keys == sorted(keys, key=[rule.key for rule in RULES].index)
    told = next(line for line in lines if "truncated" in line)
    assert re.fullmatch(
        r"  truncated 0\.4\d* \(above 0\.3\) and rising: .* \(docs/stability\.md#4-entropy-and-length\)", told
    )


def test_on_the_papers_runs() -> None:
    """docs/stability.md names these figures."""
    found: Counter[tuple[str, bool, bool]] = Counter()
    flagged: Counter[str] = Counter()
    for run in json.loads((DOCS / "paper" / "results.json").read_text())["runs"]:
        curves = run["curves"]
        if len(curves["reward/mean"]) < 16:
            continue
        each = [{"step": i + 1, **{key: values[i // 16] for key, values in curves.items()}} for i in range(256)]
        precision = {"fp32": "float32", "bf16": "bfloat16"}.get(run["arm"]["precision"], "low")
        verdict = judge(each, precision)  # type: ignore[arg-type]
        found[precision, run["collapsed"], verdict.healthy] += 1
        if not run["collapsed"]:
            flagged.update(finding.rule.key for finding in verdict.findings)
    assert sum(n for (_, collapsed, _), n in found.items() if collapsed) == 14
    assert not any(healthy and collapsed for _, collapsed, healthy in found)
    assert found["float32", False, True] == 14 and found["float32", False, False] == 0
    assert found["low", False, False] == 12 and found["low", False, True] == 52
    assert flagged == {"mismatch/kl_k3": 12}


def test_too_few_steps_tell_no_trend_but_a_level() -> None:
    few = rows(kl_k3=[1e-4] * 3, truncated_frac=[0.1, 0.12, 0.2], mean=[0.9, 0.5, 0.1])
    assert judge(few, "bfloat16").lines == ["verdict: nothing out of line in 3 steps, too few to see a trend"]
    assert broken(judge(few, "float32")) == [("mismatch/kl_k3", "above")]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"mean": [0.5] * 40 + [0.39] * 8}, ("reward/mean", "fell")),
        ({"mean": [0.5] * 40 + [0.41] * 8}, None),
        ({"mean": [-0.5] * 40 + [-0.7] * 8}, ("reward/mean", "fell")),
        ({"mean": [0.0, 0.9, 0.1, 0.2] * 12}, None),  # noise
        ({"grad_norm": [1.0, 90.0] + [1.0] * 46}, None),  # a spike
        ({"grad_norm": [1.0] * 42 + [11.0] * 6}, ("optim/grad_norm", "jumped")),
        ({"grad_norm": [1.0] * 42 + [None] * 6}, ("optim/grad_norm", "idle")),
        ({"grad_norm": [1.0] * 42 + [0.0, None, 0.0, 1.0, 1.0, 1.0]}, ("optim/grad_norm", "idle")),
        ({"grad_norm": [None, 1.0] + [1.0] * 46}, None),
        ({"truncated_frac": [0.11] * 48}, None),
        ({"truncated_frac": [0.02] * 42 + [0.11] * 6}, ("response/truncated_frac", "rising")),
        ({"truncated_frac": [0.31] * 48}, ("response/truncated_frac", "above")),
        ({"entropy": [1.0] * 24 + [0.5] * 18 + [0.6] * 6, "mean": [0.5] * 48}, None),
        (
            {"entropy": [1.0] * 24 + [0.5] * 18 + [0.6] * 6, "mean": [0.5] * 42 + [0.43] * 6},
            ("policy/entropy", "turned"),
        ),
        ({"clip_frac_neg": [0.01] * 42 + [0.25] * 6, "grad_norm": [1.0] * 48}, ("staleness/clip_frac_neg", "above")),
        ({"bad_samples": [0] * 47 + [1]}, ("batch/bad_samples", "above")),
        ({"agree_old_current": [0.89] * 48}, ("routing/agree_old_current", "below")),
    ],
)
def test_each_rule(columns: dict[str, list[Any]], expected: tuple[str, str] | None) -> None:
    if "grad_norm" not in columns:
        columns = columns | {"grad_norm": [1.0] * 48}
    assert broken(judge(rows(**columns), "bfloat16")) == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("config", "canary", "precision"),
    [
        ({}, [], "bfloat16"),
        ({}, [4e-6], "float32"),
        ({}, [4e-6, 1.5e-4], "float32"),  # of a policy that sharpened
        ({}, [0.02], "bfloat16"),
        ({"engine": {"dtype": "float32"}, "rollout": {"dtype": "auto"}}, [], "float32"),
        ({"engine": {"dtype": "float32"}, "rollout": {"dtype": "bfloat16"}}, [1e-6], "bfloat16"),
        ({"engine": {"dtype": "bfloat16"}}, [], "bfloat16"),
        ({"sync": {"quantize": "int4"}}, [4e-6], "low"),
        ({"rollout": {"quantization": "fp8"}}, [], "low"),
        ({"rollout": {"kv_cache_dtype": "fp8"}}, [], "low"),
        ({"rollout": 3, "sync": None}, [], "bfloat16"),
    ],
)
def test_the_precision_that_k3_is_judged_by(config: dict[str, Any], canary: list[float], precision: str) -> None:
    assert precision_of(config, [{"step": 1, "sync/canary_max_diff": value} for value in canary]) == precision


def test_a_comparison_is_judged_by_levels_alone() -> None:
    found = judge_figures(
        {"mismatch/kl_k3": 0.02, "routing/agree_rollout_old": 0.9, "routing/worst_gap": None}, "bfloat16"
    )
    assert [finding.text for finding in found] == ["k3 0.02 (above 0.005)", "routing agreement 0.9 (below 0.95)"]
    assert judge_figures({"mismatch/kl_k3": 0.02, "routing/agree_rollout_old": 0.9}, "low") == []


def test_fault_22_the_page_names_the_numbers_that_the_verdict_goes_by() -> None:
    """Every level stands in its section of docs/stability.md, in a line or row with its metric."""
    text = (DOCS / "stability.md").read_text()
    sections = {}
    for part in text.split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        sections[anchor] = " ".join(body.split())
    for rule in RULES:
        assert rule.key in METRICS
        body = sections[rule.section]
        levels = (
            [rule.level_at(precision) for precision in PRECISIONS] if isinstance(rule.level, tuple) else [rule.level]
        )
        assert f"`{rule.key}`" in body, rule
        for level in levels:
            assert re.search(rf"(above|below|in|least) {re.escape(f'{level:g}')}\b", body), (rule.key, rule.kind, level)
    assert f"{RISING:g} times above the median" in " ".join(text.split()) and f"fewer than {LEAST_STEPS} steps" in text
