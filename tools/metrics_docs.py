"""Writes docs/metrics.md from megarl/observe/catalog.py: `python tools/metrics_docs.py`, or with --check fails where the
file is not current.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megarl.observe.catalog import METRICS, Metric  # noqa: E402
from megarl.report.thresholds import PRECISIONS, RULES, Rule  # noqa: E402
from tools.generated import write_or_check  # noqa: E402

HEAD = """# Metrics

Made from megarl/observe/catalog.py by `python tools/metrics_docs.py`; do not edit.

One JSON object a step in `metrics.jsonl`; the same scalars go to `run.loggers`. A number that is not finite is written as null, and a
metric of a part that a run does not have is missing. Sums and counts are added up over micro-batches and ranks before anything is divided.
`megarl report` draws them, and its verdict goes by what stands here as out of line: [stability.md](stability.md).

mu, pi_old, pi_theta and the other words: [glossary.md](glossary.md). rho = pi_old/mu, r = pi_theta/pi_old, A the advantage, M the clip's
mask, sg a constant to the gradient. A mean over tokens is over all response tokens of the step. Equations in full:
[objective.md](objective.md).
"""
GROUPS = {
    "reward": "Reward",
    "response": "Responses",
    "policy": "Policy",
    "mismatch": "Mismatch: training engine against rollout engine",
    "loss": "Loss",
    "staleness": "Staleness and clipping",
    "routing": "Routing",
    "optim": "Optimizer",
    "critic": "Critic",
    "batch": "Batch",
    "sync": "Weight sync",
    "fleet": "Rollout workers",
    "async": "Overlapped rollouts",
    "time": "Time",
    "throughput": "Throughput",
    "version": "Versions",
    "eval": "Evaluation",
}
NOTES = {
    "routing": "An engine's own experts are the top-k of the live scores in the pass that ran; under replay, given the replayed experts of the "
    "layers before. Means are over the rows that predict a response token (`prompt_len - 1` to `T - 2`) and all MoE layers. The rollout's "
    "routes are captured for these metrics in every mode, unless `replay.metrics` is false.",
    "critic": "PPO only (`objective: ppo`).",
}


def main(argv: list[str]) -> int:
    return write_or_check("metrics.md", render(), "metrics_docs.py", argv)


def render() -> str:
    parts = [HEAD]
    for family, title in GROUPS.items():
        parts.append(f"\n## {title}\n\n")
        if family in NOTES:
            parts.append(f"{NOTES[family]}\n\n")
        parts.append("| key | meaning | unit | healthy |\n|---|---|---|---|\n")
        parts += [row(key, metric) for key, metric in METRICS.items() if key.startswith(f"{family}/")]
    return "".join(parts)


def row(key: str, metric: Metric) -> str:
    equation = f" `{metric.equation}`" if metric.equation else ""
    rules = [limit(rule) for rule in RULES if rule.key == key]
    healthy = ". ".join([metric.healthy] * bool(metric.healthy) + [f"Out of line: {', or '.join(rules)}"] * bool(rules))
    cells = (f"`{key}`", metric.meaning + equation, metric.unit, healthy)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def limit(rule: Rule) -> str:
    """A rule in words, with a link to its section of docs/stability.md."""
    levels = [f"{rule.level_at(precision):g}" for precision in PRECISIONS]
    level = (
        levels[0]
        if len(set(levels)) == 1
        else f"{levels[0]} in float32, {levels[1]} in bfloat16, {levels[2]} in fewer bits"
    )
    words = {
        "above": f"above {level}",
        "below": f"below {level}",
        "rising": f"above {level} and rising",
        "fell": f"under {level} times its best eighth",
        "turned": f"above {level} times its lowest eighth while the reward is not at its best",
        "jumped": f"above {level} times its usual level",
        "idle": f"0 or missing in a share of {level} of the steps",
    }
    return f"[{words[rule.kind]}](stability.md#{rule.section})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
