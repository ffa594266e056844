"""The mismatch between the two engines on the same weights and tokens:
its figures, as a table for a terminal, and as one page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch

from megarl.objective import finish, mismatch_metrics
from megarl.replay.routes import agreement
from megarl.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Axes, Series, label, line_chart, nice
from megarl.report.html import figure, html_page, tile_row, token_table

WORST = 24
BEFORE, AFTER = 24, 8  # tokens of context around a worst token
BINS = 41
PASSES = ("live", "replayed")
Figures = dict[str, float | list[float] | None]


@dataclass
class Pass:
    """One teacher-forced pass of the training engine over one response. n = response tokens, L = MoE layers, K = top-k.

    own: top-k of the live scores, under replay given the replayed earlier layers. gap: how far the rollout's experts
    lie below them in score. Both are of the rows that predict the response, None where no routes were captured.
    """

    logprobs: np.ndarray  # [n]
    own: np.ndarray | None = None  # [n, L, K]
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

    def differs(self, one: Pass) -> np.ndarray | None:
        """bool [n, L]: the set of experts is not the rollout's. None where either set is unknown."""
        return None if (agree := self.agreement(one)) is None else agree < 1

    def agreement(self, one: Pass) -> np.ndarray | None:
        """float32 [n, L]: the share of experts that are the rollout's."""
        if one.own is None or self.routes is None:
            return None
        return agreement(torch.from_numpy(one.own), torch.from_numpy(self.routes[self.prompt_len - 1 :])).numpy()


def figures(responses: list[Compared], which: str, is_cap: float) -> Figures | None:
    """Metrics of one pass ("live" or "replayed") over all response
    tokens; None if it did not run. Keys as in docs/objective.md.

    mismatch/ratio_mean: mean of pi/mu. routing/gap_*: median and ninth
    decile of the score gap over the (token, layer) that differ.
    """
    passes = [one for response in responses if (one := getattr(response, which)) is not None]
    if not passes:
        return None
    ours = torch.from_numpy(np.concatenate([one.logprobs for one in passes]))
    mu = torch.from_numpy(np.concatenate([response.rollout for response in responses]))
    found: Figures = dict(finish(mismatch_metrics(ours, mu, torch.ones_like(mu), is_cap)))
    found["mismatch/ratio_mean"] = float((ours.double() - mu.double()).exp().mean())
    routed = [(known, one.gap) for r, one in zip(responses, passes) if (known := r.agreement(one)) is not None]
    if not routed:
        return found
    agree = np.concatenate([known for known, _ in routed])
    gaps = np.concatenate([gap[known < 1] for known, gap in routed if gap is not None])
    found["routing/agree_rollout_old"] = float(agree.mean(dtype=np.float64))
    found["routing/layer_agreement"] = agree.mean(0, dtype=np.float64).tolist()
    found["routing/any_layer_differs_frac"] = float((agree < 1).any(1).mean())
    found["routing/gap_median"] = float(np.median(gaps)) if len(gaps) else None
    found["routing/gap_p90"] = float(np.quantile(gaps, 0.9)) if len(gaps) else None
    found["routing/worst_gap"] = float(gaps.max()) if len(gaps) else 0.0
    return found


def worst_tokens(
    responses: list[Compared], decode: Callable[[list[int]], str], count: int = WORST
) -> list[dict[str, Any]]:
    """The response tokens with the largest |log pi - log mu| with live routing, largest first, in their text."""
    order = [(abs(float(d)), i, t) for i, r in enumerate(responses) for t, d in enumerate(r.live.logprobs - r.rollout)]
    found = []
    for difference, i, t in sorted(order, key=lambda entry: (-entry[0], entry[1:]))[:count]:
        response = responses[i]
        at = response.prompt_len + t
        row: dict[str, Any] = {
            "response": i,
            "position": t,
            "before": decode(response.tokens[max(0, at - BEFORE) : at]),
            "token": decode([response.tokens[at]]),
            "after": decode(response.tokens[at + 1 : at + 1 + AFTER]),
            "difference": difference,
            "rollout": float(response.rollout[t]),
        }
        for which in PASSES:
            one = getattr(response, which)
            row[which] = None if one is None else float(one.logprobs[t])
            differs = None if one is None else response.differs(one)
            row[f"layers_{which}"] = None if differs is None else np.flatnonzero(differs[t]).tolist()
        found.append(row)
    return found


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
        values = [one.get(key) for one in ran]
        if any(value is not None for value in values):
            rows.append((name, ["-" if value is None else form.format(value) for value in values]))
    for layer in range(len(ran[0].get("routing/layer_agreement") or [])):
        rows.append((f"agreement, MoE layer {layer}", [f"{one['routing/layer_agreement'][layer]:.4%}" for one in ran]))
    return rows


def text_table(report: dict[str, Any]) -> str:
    """The same for a terminal, under one line that says what was compared."""
    rows = table(report)
    head = ["live routing", "routes replayed"][: len(rows[0][1])]
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{name:>18}" for name in head)]
    lines += [f"{name:{width}}" + "".join(f"{value:>18}" for value in values) for name, values in rows]
    return f"{subject(report)}\n\n" + "\n".join(lines)


def subject(report: dict[str, Any]) -> str:
    return (
        f"{report['responses']} responses to {report['prompts']} prompts, {report['tokens']} tokens, "
        f"temperature {report['temperature']:g}; rollout in {report['rollout_dtype']}, "
        f"training in {report['engine_dtype']}, {report['layout']}"
    )


STYLE = ".narrow{max-width:720px}"


def render(report: dict[str, Any], responses: list[Compared]) -> str:
    """The page: figures, the histogram of the log-ratio, agreement by layer, and the worst tokens in their text."""
    live, ran = report["live"], [which for which in PASSES if report[which] is not None]
    tiles = [(f"KL k3, {which}", f"{report[which]['mismatch/kl_k3']:.2e}") for which in ran]
    tiles += [("largest |log pi - log mu|, live", f"{live['mismatch/abs_logprob_diff_max']:.2e}")]
    if live.get("routing/agree_rollout_old") is not None:
        tiles += [("routing agreement, live", f"{live['routing/agree_rollout_old']:.4%}")]
    keys = "".join(f'<span><i style="background:var(--c{i})"></i>{which}</span>' for i, which in enumerate(ran))
    ratios = {
        w: np.concatenate([getattr(r, w).logprobs.astype(np.float64) - r.rollout for r in responses]) for w in ran
    }
    charts = figure("Tokens by log pi - log mu", keys, "", histogram(list(ratios.values())))
    if layers := live.get("routing/layer_agreement"):
        series = [Series(which, list(report[which]["routing/layer_agreement"])) for which in ran]
        charts += figure(
            "Routing agreement by MoE layer", keys, "", line_chart(list(range(len(layers))), series, high=1.0)
        )
    head = "".join(f"<th>{name}</th>" for name in ("", "live routing", "routes replayed")[: 1 + len(ran)])
    body = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>" for name, values in table(report)
    )
    return html_page(
        f"{report['model']}: mismatch",
        f"<h1>Training engine against rollout engine: {escape(report['model'])}</h1><p>{escape(subject(report))}. "
        "The same weights, two engines: pi of the trainer against mu of the rollout. Zero is perfect.</p>"
        f'{tile_row(tiles)}<div class="grid">{charts}</div><h2>Figures</h2>'
        f'<div class="scroll narrow"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "<h2>Worst tokens</h2><p>By |log pi - log mu| with live routing; layers are MoE layers whose experts are not "
        "the rollout's.</p>"
        f"{_worst(report['worst'], len(ran) > 1)}",
        STYLE,
    )


def _worst(rows: list[dict[str, Any]], replayed: bool) -> str:
    cells = []
    for row in rows:
        numbers = [row["rollout"], row["live"], *([row["replayed"]] if replayed else [])]
        layers = "-" if row["layers_live"] is None else ", ".join(map(str, row["layers_live"])) or "none"
        cells.append([*(f"{number:.4f}" for number in numbers), layers])
    names = ["log mu", "log pi, live", *(["log pi, replayed"] if replayed else []), "layers that differ, live"]
    return token_table(rows, names, cells)


def histogram(series: list[np.ndarray]) -> str:
    """The inside of an SVG: tokens a bin on a logarithmic scale, one
    outline a series, all over the same bins, symmetric about 0.
    """
    edge = max(float(np.abs(values).max()) for values in series) or 1e-9
    counts = [np.histogram(values, BINS, (-edge, edge))[0] for values in series]
    axes = Axes([0, BINS], 0.5, max(int(c.max()) for c in counts), log=True)
    floor = HEIGHT - BOTTOM
    parts = []
    for value, text in axes.ticks():
        if value >= 1:
            parts.append(
                f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.y(value):.1f}" y2="{axes.y(value):.1f}"/>'
            )
            parts.append(
                f'<text class="tick" x="{LEFT - 5}" y="{axes.y(value) + 4:.1f}" text-anchor="end">{text}</text>'
            )
    step = nice(edge / 2)
    for n in range(-math.floor(edge / step), math.floor(edge / step) + 1):
        x = axes.x((n * step / edge + 1) / 2 * BINS)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{label(n * step, step)}</text>'
        )
    for i, count in enumerate(counts):
        heights = [axes.y(float(c)) if c else floor for c in count]
        corners = [f"{axes.x(x):.1f},{y:.1f}" for n, y in enumerate(heights) for x in (n, n + 1)]
        parts.append(
            f'<polyline class="line s{i}" points="{LEFT},{floor} {" ".join(corners)} {WIDTH - RIGHT},{floor}"/>'
        )
    return "".join(parts)
