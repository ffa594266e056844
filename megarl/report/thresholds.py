"""Where a curve is out of line: the numbers of docs/stability.md, once.

The verdict of a report judges by them, its charts shade what lies beyond them, and a test holds the page to them. The
levels come from the 104 runs of docs/paper/results.json and from what low precision costs there (docs/paper.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GUIDE = "docs/stability.md"
ENGINES, ROUTES, UPDATES, ENTROPY, GRADIENT, FIRST = (
    "1-are-the-engines-the-same",
    "2-do-the-routes-agree",
    "3-how-far-do-n-updates-move",
    "4-entropy-and-length",
    "5-gradient-norm",
    "what-to-change-first",
)  # the anchors of its sections

Precision = Literal["float32", "bfloat16", "low"]  # of the rollout; low: fp8, int8, int4 weights or KV cache
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "low")

RISING = 1.5  # times the median of all steps
LEAST_STEPS = 16  # below it nothing is said of a trend


@dataclass(frozen=True)
class Rule:
    """When `key` is out of line. The end is the mean of the last eighth of the steps.

    kind  above, below   the end lies beyond the level
          rising         it lies above the level and RISING times above the median of all steps
          fell           it lies under the level times the best eighth, by more than the noise of both
          turned         it lies above the level times the lowest eighth, while the reward is not at its best
          jumped         the median of the last eighth lies above the level times the median of the steps before
          idle           that share of the last eighth's steps has no value, or 0
    level: one number, or one a precision of the rollout. name: how a verdict calls the metric. change: what to do.
    """

    key: str
    name: str
    kind: Literal["above", "below", "rising", "fell", "turned", "jumped", "idle"]
    level: float | tuple[float, float, float]
    section: str
    change: str

    def level_at(self, precision: Precision) -> float:
        return self.level[PRECISIONS.index(precision)] if isinstance(self.level, tuple) else self.level


RULES = (
    Rule(
        "mismatch/kl_k3",
        "k3",
        "above",
        (1e-8, 5e-3, 0.1),
        ENGINES,
        "check the canary, rollout.temperature and the conversion; in low precision try a finer sync.quantize",
    ),
    Rule(
        "mismatch/kl_k3",
        "k3",
        "rising",
        (1e-9, 1e-3, 0.05),
        ENGINES,
        "the mismatch feeds itself: lower train.lr, weight by mu (objective: minirl), replay routes (replay.mode: R3)",
    ),
    Rule(
        "mismatch/extreme_frac_2",
        "tokens off by a factor of 2",
        "rising",
        0.03,
        ENGINES,
        "the early sign of a rising k3: lower train.lr, replay routes (replay.mode: R3)",
    ),
    Rule(
        "routing/agree_rollout_old",
        "routing agreement",
        "below",
        (0.999, 0.95, 0.85),
        ROUTES,
        "replay the rollout's routes (replay.mode: R3), or keep the router out of sync.quantize_also",
    ),
    Rule(
        "routing/agree_old_current",
        "routing agreement within a step",
        "below",
        0.9,
        ROUTES,
        "hold the routes (replay.mode: R2 or R3), or take fewer batch.minibatches",
    ),
    Rule(
        "staleness/clip_frac_pos",
        "clipped tokens (A > 0)",
        "above",
        0.2,
        UPDATES,
        "lower train.lr or batch.minibatches: much of what is rolled out is thrown away",
    ),
    Rule(
        "staleness/clip_frac_neg",
        "clipped tokens (A < 0)",
        "above",
        0.2,
        UPDATES,
        "lower train.lr or batch.minibatches: much of what is rolled out is thrown away",
    ),
    Rule(
        "response/truncated_frac",
        "truncated",
        "above",
        0.3,
        ENTROPY,
        "raise rollout.max_new_tokens if it was so from the start; else go back to a checkpoint, with a lower train.lr",
    ),
    Rule(
        "response/truncated_frac",
        "truncated",
        "rising",
        0.1,
        ENTROPY,
        "end-of-text is being unlearned: go back to a checkpoint from before, with a lower train.lr",
    ),
    Rule(
        "policy/entropy",
        "entropy",
        "turned",
        1.1,
        ENTROPY,
        "the steps are too long: halve train.lr, set train.lr_warmup_iters",
    ),
    Rule(
        "optim/grad_norm",
        "gradient norm",
        "jumped",
        10.0,
        GRADIENT,
        "lower train.lr; single spikes are train.clip_grad's and no matter",
    ),
    Rule(
        "optim/grad_norm",
        "gradient norm",
        "idle",
        0.5,
        GRADIENT,
        "nothing is learnt where all rewards of a group are equal: change the prompts or batch.group",
    ),
    Rule(
        "reward/mean",
        "reward",
        "fell",
        0.8,
        FIRST,
        "where no other curve is out of line, it is the reward or the data: read the samples",
    ),
    Rule(
        "batch/bad_samples",
        "bad samples a step",
        "above",
        0.0,
        FIRST,
        "the run's output names the first of each step; their steps are not trained on",
    ),
)
