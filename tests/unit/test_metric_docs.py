"""docs/metrics.md and docs/glossary.md explain whatever the code can log."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from megarl.observe.catalog import METRICS
from tools import metrics_docs

ROOT = Path(__file__).parents[2]
KEY = re.compile(rf"({'|'.join(metrics_docs.GROUPS)})/[a-z0-9_]+")
# Not literal in the source: finish() makes them of other keys, or a loop of names.
DERIVED = {"critic/grad_norm", "critic/lr", "async/mismatch_k3_by_lag", "async/staleness_k3_by_lag"}
# Literal in the source, but never in metrics.jsonl: moments, or figures of `megarl compare` and of a report.
OTHERS = {
    *("critic/return_square", "critic/square_error"),
    *("mismatch/ratio_mean", "routing/gap_median", "routing/gap_p90", "time/other_s"),
}


def keys_in_source() -> set[str]:
    """Texts of megarl/ that have the form of a key, without a reduction's suffix (":max")."""
    found = set()
    for file in (ROOT / "megarl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and file.name != "catalog.py":
                key = node.value.removesuffix(":max")
                found |= {key} if KEY.fullmatch(key) else set()
    return found


def test_fault_24_every_key_that_the_code_can_write_is_explained() -> None:
    assert keys_in_source() - OTHERS - set(METRICS) == set(), "explain these in megarl/observe/catalog.py"
    assert set(METRICS) - keys_in_source() - DERIVED == set(), "nothing writes these"
    for key, metric in METRICS.items():
        assert KEY.fullmatch(key) and metric.meaning.endswith("."), key


def test_fault_24_the_page_is_current_and_names_each_once() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == metrics_docs.render(), "run: python tools/metrics_docs.py"
    for key in METRICS:
        assert page.count(f"\n| `{key}` |") == 1, key


def test_fault_24_the_glossary_explains_the_words_that_keys_and_metrics_use() -> None:
    lines = (ROOT / "docs" / "glossary.md").read_text().splitlines()
    rows = [line[2:] for line in lines if line.startswith("| ") and not line.startswith("| word")]
    assert rows == sorted(rows, key=str.lower), "in order of the alphabet"
    words = [word for row in rows for word in row.split(" | ")[0].split(", ")]
    assert len(set(words)) == len(words)
    wanted = "mu pi_old pi_theta rho staleness mismatch k3 R2 R3 mini-batch pack refit lag canary"
    assert set(wanted.split()) <= set(words)
