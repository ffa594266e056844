"""Mismatch and staleness by lag: each the figure of its own tokens alone, and all of them reduced at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megarl.config import load_config
from megarl.engine.batch import make_packs
from megarl.loop import by_lag as module
from megarl.loop.batch import Span
from megarl.loop.reduce import reduce_sums
from megarl.objective import Sums, finish, merge, mismatch_metrics, staleness_metrics
from megarl.weights.map.layout import Layout

PROMPT, RESPONSE, CAP = 2, 6, 5.0
SPANS = [  # rows from 1 on predict the response
    [Span(0, 1, 7, False)],
    [Span(3, 1, 4, False), Span(0, 4, 7, True)],
    [Span(2, 1, 7, False)],
    [Span(4, 1, 2, False), Span(1, 2, 7, False)],
    [Span(5, 1, 7, False)],
]
ROWS = {  # lag in batches of two updates -> (response, rows)
    0: [(0, 1, 7), (1, 4, 7)],
    1: [(2, 1, 7), (3, 2, 7)],
    2: [(1, 1, 4), (3, 1, 2)],
    3: [(4, 1, 7)],
    4: [],
}


@pytest.mark.parametrize(("max_lag", "batches"), [(5, 3), (8, 4)])  # two batches and an update are a third one
def test_figures_are_of_the_tokens_of_a_lag_and_are_reduced_once(
    monkeypatch: pytest.MonkeyPatch, max_lag: int, batches: int
) -> None:
    config = load_config(None, [f"rollout.max_lag={max_lag}", "batch.minibatches=2", f"objective.is_cap={CAP}"])
    layout = Layout(world=1)
    at: Any = SimpleNamespace(is_last_stage=True, layout=layout, coord=layout.coord(0))
    tokens = [torch.arange(PROMPT + RESPONSE) for _ in SPANS]
    packs = make_packs([[0, 1], [2, 3, 4]], tokens, [PROMPT] * len(SPANS), layout, layout.coord(0))
    generator = torch.Generator().manual_seed(0)
    for pack in packs:
        pack.rollout.logprobs, pack.passes.old_logprobs, pack.passes.logprobs = (
            -torch.rand(pack.padded, generator=generator) for _ in range(3)
        )
    calls = []
    monkeypatch.setattr(module, "reduce_sums", lambda *given: calls.append(given) or reduce_sums(*given))
    found = module.by_lag(config, at, packs, SPANS)

    def k3(rows: list[tuple[int, int, int]]) -> tuple[float, float]:
        sums: Sums = {}
        for pack in packs:
            mask = torch.zeros(pack.padded, dtype=torch.bool)
            for start, response in zip(pack.starts, pack.responses, strict=True):
                for of, first, last in rows:
                    mask[start + first : start + last] |= of == response
            old, new = pack.passes.old_logprobs, pack.passes.logprobs
            sums = merge(sums, mismatch_metrics(old, pack.rollout.logprobs, mask, CAP))
            sums = merge(sums, staleness_metrics(new[mask], old[mask]))
        means = finish(sums)
        return means["mismatch/kl_k3"], means["staleness/kl_k3"]

    wanted = [k3(rows) if rows else (0.0, 0.0) for rows in list(ROWS.values())[: batches + 1]]
    assert found["async/mismatch_k3_by_lag"] == [mismatch for mismatch, _ in wanted]
    assert found["async/staleness_k3_by_lag"] == [staleness for _, staleness in wanted]
    assert found["async/in_flight_k3"] == k3([(1, 4, 7)])[0]
    assert len(calls) == 1
