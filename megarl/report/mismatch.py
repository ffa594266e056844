"""The mismatch between the two engines on the same weights and tokens:
its figures, as a table for a terminal, and as one page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl.objective import finish, mismatch_metrics
from megarl.replay.routes import agreement
from megarl.report.charts import Chart, Line, figure
from megarl.report.page import capital, page, table_of, tiles, token_table, verdict_box
from megarl.report.thresholds import PRECISIONS, RULES
from megarl.report.verdict import Finding, judge_figures, show

WORST = 24
BEFORE, AFTER = 24, 8  # tokens of context around a worst token
BINS = 41
PASSES = ("live", "replayed")
Figures = dict[str, float | list[float] | None]


@dataclass
class Pass:
    """One teacher-forced pass of the training engine over one response. n = response tokens, L = MoE layers, K = top-k.

    top_k: of the live scores, under replay given the replayed earlier layers. gap: how far the rollout's experts
    lie below them in score. Both are of the rows that predict the response, None where no routes were captured.
    """

    logprobs: np.ndarray  # [n]
    top_k: np.ndarray | None = None  # [n, L, K]
    gap: np.ndarray | None = None  # [n, L]


@dataclass
class Compared:
    """One response: what the rollout engine said of it, and each pass."""

    tokens: list[int]
    prompt_len: int
    rollout: np.ndarray  # log mu [n]
    routes: np.ndarray | None  # the rollout's [T - 1, L, K]
    live: Pass
    replayed: Pass | None

    def differs(self, scored: Pass) -> np.ndarray | None:
        """bool [n, L]: the set of experts is not the rollout's. None where either set is unknown."""
        return None if (agree := self.agreement(scored)) is None else agree < 1

    def agreement(self, scored: Pass) -> np.ndarray | None:
        """float32 [n, L]: the share of experts that are the rollout's."""
        if scored.top_k is None or self.routes is None:
            return None
        return agreement(torch.from_numpy(scored.top_k), torch.from_numpy(self.routes[self.prompt_len - 1 :])).numpy()


def figures(responses: list[Compared], which: str, is_cap: float) -> Figures | None:
    """Metrics of one pass ("live" or "replayed") over all response
    tokens; None if it did not run. Keys as in docs/objective.md.

    mismatch/ratio_mean: mean of pi/mu. routing/gap_*: median and ninth
    decile of the score gap over the (token, layer) that differ.
    """
    passes = [scored for response in responses if (scored := getattr(response, which)) is not None]
    if not passes:
        return None
    ours = torch.from_numpy(np.concatenate([scored.logprobs for scored in passes]))
    mu = torch.from_numpy(np.concatenate([response.rollout for response in responses]))
    values: Figures = dict(finish(mismatch_metrics(ours, mu, torch.ones_like(mu), is_cap)))
    values["mismatch/ratio_mean"] = float((ours.double() - mu.double()).exp().mean())
    routed = [
        (known, scored.gap)
        for r, scored in zip(responses, passes, strict=True)
        if (known := r.agreement(scored)) is not None
    ]
    if not routed:
        return values
    agree = np.concatenate([known for known, _ in routed])
    gaps = np.concatenate([gap[known < 1] for known, gap in routed if gap is not None])
    values["routing/agree_rollout_old"] = float(agree.mean(dtype=np.float64))
    values["routing/layer_agreement"] = agree.mean(0, dtype=np.float64).tolist()
    values["routing/any_layer_differs_frac"] = float((agree < 1).any(1).mean())
    values["routing/gap_median"] = float(np.median(gaps)) if len(gaps) else None
    values["routing/gap_p90"] = float(np.quantile(gaps, 0.9)) if len(gaps) else None
    values["routing/worst_gap"] = float(gaps.max()) if len(gaps) else 0.0
    return values


def worst_tokens(
    responses: list[Compared], decode: Callable[[list[int]], str], count: int = WORST
) -> list[dict[str, Any]]:
    """The response tokens with the largest |log pi - log mu| with live routing, largest first, in their text."""
    order = [(abs(float(d)), i, t) for i, r in enumerate(responses) for t, d in enumerate(r.live.logprobs - r.rollout)]
    rows = []
    for difference, i, t in sorted(order, key=lambda entry: (-entry[0], entry[1:]))[:count]:
        response = responses[i]
        place = response.prompt_len + t
        row: dict[str, Any] = {
            "response": i,
            "position": t,
            "before": decode(response.tokens[max(0, place - BEFORE) : place]),
            "token": decode([response.tokens[place]]),
            "after": decode(response.tokens[place + 1 : place + 1 + AFTER]),
            "difference": difference,
            "rollout": float(response.rollout[t]),
        }
        for which in PASSES:
            scored = getattr(response, which)
            row[which] = None if scored is None else float(scored.logprobs[t])
            differs = None if scored is None else response.differs(scored)
            row[f"layers_{which}"] = None if differs is None else np.flatnonzero(differs[t]).tolist()
        rows.append(row)
    return rows


# key of Figures, its name, its form
ROWS = (
    ("mismatch/kl_k1", "KL(mu, pi), k1", "{:.3e}"),
    ("mismatch/kl_k3", "KL(mu, pi), k3", "{:.3e}"),
    ("mismatch/abs_logprob_diff_max", "largest |log pi - log mu|", "{:.3e}"),
    ("mismatch/extreme_frac_2", "tokens off by more than a factor of 2", "{:.3%}"),
    ("mismatch/ratio_mean", "mean of pi/mu", "{:.6f}"),
    ("mismatch/is_truncated_frac", "tokens with pi/mu above the cap", "{:.3%}"),
    ("routing/agree_rollout_old", "routing agreement", "{:.4%}"),
    ("routing/any_layer_differs_frac", "tokens with a layer that differs", "{:.3%}"),
    ("routing/gap_median", "score gap of a difference, median", "{:.2e}"),
    ("routing/gap_p90", "score gap of a difference, 9th decile", "{:.2e}"),
    ("routing/worst_gap", "score gap of a difference, largest", "{:.2e}"),
)


def table(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, a text for live and, where it ran, replayed); the figures that neither has are left out."""
    ran = [report[which] for which in PASSES if report[which] is not None]
    rows = []
    for key, name, form in ROWS:
        values = [values_of_pass.get(key) for values_of_pass in ran]
        if any(value is not None for value in values):
            rows.append((name, ["-" if value is None else form.format(value) for value in values]))
    for layer in range(len(ran[0].get("routing/layer_agreement") or [])):
        rows.append(
            (
                f"agreement, MoE layer {layer}",
                [f"{values_of_pass['routing/layer_agreement'][layer]:.4%}" for values_of_pass in ran],
            )
        )
    return rows


def text_table(report: dict[str, Any]) -> str:
    """For a terminal: what was compared, the verdict, the figures."""
    rows = table(report)
    head = ["live routing", "routes replayed"][: len(rows[0][1])]
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{name:>18}" for name in head)]
    lines += [f"{name:{width}}" + "".join(f"{value:>18}" for value in values) for name, values in rows]
    heading, findings = verdict(report)
    judged = "\n".join([f"verdict: {heading}", *(f"  {finding.line}" for finding in findings)])
    return f"{subject(report)}\n{judged}\n\n" + "\n".join(lines)


def verdict(report: dict[str, Any]) -> tuple[str, list[Finding]]:
    """(one line, what is out of line) of the pass that a run would train on: under R3 the one with routes replayed."""
    live, replayed, precision = report["live"], report["replayed"], report["precision"]
    judged = replayed if replayed is not None and report["replay"] == "R3" else live
    findings = judge_figures(judged, precision)
    limit = next(rule for rule in RULES if rule.key == "mismatch/kl_k3").level_at(precision)
    k3 = judged["mismatch/kl_k3"]
    name = "low precision" if precision == PRECISIONS[-1] else precision
    text = "out of line" if findings else "healthy"
    text += f": k3 {show(k3)}, of which {name} bears {show(limit)}"
    if replayed is not None and live["mismatch/kl_k3"] > 0:
        share = 1 - replayed["mismatch/kl_k3"] / live["mismatch/kl_k3"]
        text += f"; replaying routes takes {max(0.0, share):.0%} out of it"
    return text, findings


def subject(report: dict[str, Any]) -> str:
    return (
        f"{report['responses']} responses to {report['prompts']} prompts, {report['tokens']} tokens, "
        f"temperature {report['temperature']:g}; rollout in {report['rollout_dtype']}"
        f"{'' if report['quantize'] == 'none' else ', weights sent in ' + report['quantize']}, "
        f"training in {report['engine_dtype']}, {report['layout']}"
    )


def render(report: dict[str, Any], responses: list[Compared], where: Path) -> str:
    """The page: verdict, figures, histogram of the log-ratio, agreement by layer, the worst tokens in their text.

    where: the folder it will lie in.
    """
    live, ran = report["live"], [which for which in PASSES if report[which] is not None]
    named = [(f"KL k3, {which}", f"{report[which]['mismatch/kl_k3']:.2e}") for which in ran]
    named += [("largest |log pi - log mu|, live", f"{live['mismatch/abs_logprob_diff_max']:.2e}")]
    if live.get("routing/agree_rollout_old") is not None:
        named += [("routing agreement, live", f"{live['routing/agree_rollout_old']:.4%}")]
    ratios = {w: np.concatenate([getattr(r, w).logprobs.astype(float) - r.rollout for r in responses]) for w in ran}
    charts = [histogram(ratios)]
    if layers := live.get("routing/layer_agreement"):
        lines = [Line(which, list(report[which]["routing/layer_agreement"]), i) for i, which in enumerate(ran)]
        x = [float(layer) for layer in range(len(layers))]
        charts.append(
            Chart("Routing agreement by MoE layer", ["routing/layer_agreement"], "line", lines, x, "layer", high=1.0)
        )
    heading, findings = verdict(report)
    figures_table = table_of(
        ["", "live routing", "routes replayed"][: 1 + len(ran)], [[name, *values] for name, values in table(report)]
    )
    body = (
        f"<h1>Training engine against rollout engine: {escape(report['model'])}</h1><p>{escape(subject(report))}. "
        "The same weights, two engines: pi of the trainer against mu of the rollout. Zero is perfect.</p>"
        f"{verdict_box(capital(heading), findings, where, {})}{tiles(named)}"
        f'<div class="grid">{"".join(figure(chart, i) for i, chart in enumerate(charts))}</div><h2>Figures</h2>'
        f'<div class="narrow">{figures_table}</div><h2>Worst tokens</h2><p>By |log pi - log mu| with live routing; '
        "layers are MoE layers whose experts are not the rollout's.</p>"
        f"{_worst(report['worst'], len(ran) > 1)}"
    )
    return page(
        f"{report['model']}: mismatch", body, {"steps": [], "charts": [chart.data() for chart in charts], "samples": []}
    )


def _worst(rows: list[dict[str, Any]], replayed: bool) -> str:
    cells = []
    for row in rows:
        numbers = [row["rollout"], row["live"], *([row["replayed"]] if replayed else [])]
        layers = "-" if row["layers_live"] is None else ", ".join(map(str, row["layers_live"])) or "none"
        cells.append([*(f"{number:.4f}" for number in numbers), layers])
    names = ["log mu", "log pi, live", *(["log pi, replayed"] if replayed else []), "layers that differ, live"]
    return token_table(rows, names, cells)


def histogram(ratios: dict[str, np.ndarray]) -> Chart:
    """Tokens a bin of log pi - log mu: an outline a pass, over the same bins, symmetric about 0."""
    edge = max(float(np.abs(values).max()) for values in ratios.values()) or 1e-9
    lines, edges = [], np.linspace(-edge, edge, BINS + 1)
    for i, (name, values) in enumerate(ratios.items()):
        counts = [float(count) for count in np.histogram(values, edges)[0]]
        lines.append(Line(name, [*counts, counts[-1]], i))  # the last bin's right edge
    return Chart(
        "Tokens by log pi - log mu",
        [],
        "stairs",
        lines,
        [float(x) for x in edges],
        "log pi - log mu",
        log=True,
        low=0.0,
    )
