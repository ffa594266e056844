"""Run directories to one compact JSON: what each run scored, its curves
in at most 16 points, what it cost. Pure but for reading files.
"""

from __future__ import annotations

import json
import math
import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from megarl.observe.metrics import read_metrics
from tools.grid.arms import RECORD, Arm, base

COLLAPSED_BELOW = 0.8  # of the best eighth's mean reward; fixed before any run
POINTS = 16
CURVES = (
    "reward/mean",
    "response/length_mean",
    "policy/entropy",
    "mismatch/kl_k3",
    "mismatch/extreme_frac_2",
    "routing/agree_rollout_old",
    "routing/agree_old_current",
    "staleness/kl_k3",
    "staleness/clip_frac_pos",
    "staleness/clip_frac_neg",
    "loss/weight_mean",
    "optim/grad_norm",
    "sync/canary_max_diff",
)


def eighths(values: list[float]) -> list[float]:
    """Means of eight equal parts, in order; with fewer than eight values, the values."""
    parts = min(8, len(values))
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    return [fmean(values[a:b]) for a, b in pairwise(edges)]


def collapsed(rewards: list[float], failed: bool = False) -> bool:
    """The criterion: the last eighth's mean reward under 0.8 of the best eighth's, or a run that could not go on."""
    parts = eighths(rewards) if rewards else []
    return failed or not parts or not parts[-1] >= COLLAPSED_BELOW * max(parts)


def collect(out: Path, steps: int) -> dict[str, Any]:
    """What results.json holds, of every run under `out` that has ended:
    of the grid itself those of `steps` at the grid's learning rate.
    """
    runs = []
    for path in sorted((out / "runs").glob(f"*/{RECORD}")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["arm"]["kind"] == "rl" and (record["steps"], record["lr"]) != (steps, base().train.lr):
            continue
        rows = read_metrics(path.parent) if (path.parent / "metrics.jsonl").is_file() else []
        runs.append(_run(record, rows))
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores",
        "collapsed_below": COLLAPSED_BELOW,
    }
    return {**head, "lr": base().train.lr, "warmup": base().train.lr_warmup_iters, "runs": runs}


def _run(record: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    arm = Arm(**record["arm"])
    rewards = [row["reward/mean"] for row in rows]
    curves = {key: _thin([row.get(key) for row in rows]) for key in CURVES}
    parts = eighths(rewards) if rewards else [math.nan]
    return {
        "name": arm.name,
        **{key: value for key, value in record.items() if key != "arm"},
        "arm": record["arm"],
        "rollouts": len(rows),
        "first": _short(parts[0]),
        "last": _short(parts[-1]),
        "best": _short(max(parts)),
        "collapsed": collapsed(rewards, record["failure"] is not None),
        "seconds_a_rollout": _short(fmean([row["time/step_s"] for row in rows])) if rows else None,
        "curves": {key: values for key, values in curves.items() if any(value is not None for value in values)},
    }


def _thin(values: list[float | None]) -> list[float | None]:
    parts = min(POINTS, len(values))
    edges = [round(i * len(values) / max(parts, 1)) for i in range(parts + 1)]
    groups = [[v for v in values[a:b] if v is not None and math.isfinite(v)] for a, b in pairwise(edges)]
    return [_short(fmean(group)) if group else None for group in groups]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
