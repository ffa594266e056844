"""Which charts a report shows, by family: the metrics of docs/metrics.md. Mismatch and staleness share no chart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """One chart: metric key -> the name it is shown under. low, high: what its axis shows at least.

    kind  line   a line a key
          area   the keys stacked; of several runs a line of `total` each
          heat   the one key's list, a row a layer; of one run only
    """

    title: str
    keys: dict[str, str]
    kind: Literal["line", "area", "heat"] = "line"
    log: bool = False
    low: float | None = None
    high: float | None = None
    total: str | None = None


@dataclass(frozen=True)
class Group:
    title: str
    text: str
    panels: list[Panel] = field(default_factory=list)


GROUPS = [
    Group(
        "Learning",
        "What the policy earns, and how it changes while it does.",
        [
            Panel("Reward", {"reward/mean": "mean", "reward/pass_at_g": "pass@G"}, low=0.0, high=1.0),
            Panel("Reward spread", {"reward/std": "standard deviation"}, low=0.0),
            Panel("Evaluation", {"eval/mean_at_k": "mean@k", "eval/pass_at_k": "pass@k"}, low=0.0, high=1.0),
            Panel("Response length, tokens", {"response/length_mean": "mean"}, low=0.0),
            Panel("Truncated responses", {"response/truncated_frac": "share"}, low=0.0),
            Panel("Entropy, nats", {"policy/entropy": "mean over response tokens"}, low=0.0),
            Panel("Loss", {"loss/value": "value"}),
            Panel("Gradient norm", {"optim/grad_norm": "before clipping"}, log=True),
            Panel("Learning rate", {"optim/lr": "lr"}, low=0.0),
            Panel("KL(pi_theta, reference)", {"policy/kl_reference": "k3"}, log=True),
        ],
    ),
    Group(
        "Mismatch: training engine against rollout engine",
        "The same weights, two engines: pi_old against mu. Zero is perfect.",
        [
            Panel("KL(mu, pi_old)", {"mismatch/kl_k3": "k3"}, log=True),
            Panel("KL(mu, pi_old), signed", {"mismatch/kl_k1": "k1"}),
            Panel("Largest |log pi_old - log mu|", {"mismatch/abs_logprob_diff_max": "maximum"}, log=True),
            Panel("Canary after a weight sync, largest |difference|", {"sync/canary_max_diff": "maximum"}, log=True),
            Panel("Tokens off by more than a factor of 2", {"mismatch/extreme_frac_2": "share"}, low=0.0),
            Panel(
                "Importance weight",
                {"mismatch/is_weight_mean": "min(pi_old/mu, cap)", "loss/weight_mean": "as applied"},
            ),
            Panel(
                "Truncated weights",
                {"mismatch/is_truncated_frac": "of pi_old/mu", "loss/weight_truncated_frac": "as applied"},
                low=0.0,
            ),
        ],
    ),
    Group(
        "Staleness and clipping",
        "The policy of each mini-batch against the one that rolled out: pi_theta against pi_old.",
        [
            Panel("KL(pi_old, pi_theta)", {"staleness/kl_k3": "k3"}, log=True),
            Panel("Largest ratio pi_theta / pi_old", {"staleness/ratio_max": "maximum"}, low=1.0),
            Panel("Clipped tokens", {"staleness/clip_frac_pos": "A > 0", "staleness/clip_frac_neg": "A < 0"}, low=0.0),
            Panel("Lag, optimizer steps", {"version/rollout_lag_max": "largest"}, low=0.0),
        ],
    ),
    Group(
        "Routing",
        "How far the engines, and the policy over its own updates, choose the same experts.",
        [
            Panel(
                "Agreement",
                {"routing/agree_rollout_old": "rollout and pi_old", "routing/agree_old_current": "pi_old and pi_theta"},
                high=1.0,
            ),
            Panel("Tokens with a layer that differs", {"routing/any_layer_differs_frac": "share"}, low=0.0),
            Panel("Largest score gap of a difference", {"routing/worst_gap": "maximum"}, low=0.0),
            Panel("Agreement by MoE layer and step", {"routing/layer_agreement": "layer"}, kind="heat"),
            Panel(
                "Bytes of routes",
                {"routing/bytes_received_per_rank": "received, a rank", "routing/bytes_ingested": "ingested"},
                low=0.0,
            ),
            Panel("Rows without routes", {"routing/missing_rows": "rows"}, low=0.0),
        ],
    ),
    Group(
        "Batch",
        "What was sampled, and what of it could be learnt from.",
        [
            Panel(
                "Groups",
                {
                    "batch/groups": "trained on",
                    "batch/equal_groups": "all rewards equal",
                    "batch/refilled_groups": "refilled",
                },
                low=0.0,
            ),
            Panel(
                "Left out",
                {"batch/bad_samples": "bad samples", "batch/skipped_updates": "updates", "response/empty": "empty"},
                low=0.0,
            ),
        ],
    ),
    Group(
        "Critic",
        "PPO's other half.",
        [
            Panel("Value loss", {"critic/loss": "loss"}, low=0.0),
            Panel("Values and returns", {"critic/value_mean": "value", "critic/return_mean": "return"}),
            Panel("Explained variance", {"critic/explained_variance": "share"}, high=1.0),
            Panel("Clipped values", {"critic/clip_frac": "share"}, low=0.0),
            Panel("Critic's gradient norm", {"critic/grad_norm": "before clipping"}, log=True),
        ],
    ),
    Group(
        "Time",
        "Where a step goes.",
        [
            Panel(
                "Seconds a step",
                {
                    "time/rollout_s": "rollout",
                    "time/old_logprob_s": "old log-probabilities",
                    "time/reference_s": "reference",
                    "time/values_s": "values",
                    "time/update_s": "update",
                    "time/canary_s": "canary",
                    "time/sync_s": "weight sync",
                    "time/other_s": "other",
                },
                kind="area",
                total="time/step_s",
            ),
            Panel(
                "Tokens a second",
                {"throughput/tokens_per_s": "whole step", "throughput/train_tokens_per_s": "training"},
                low=0.0,
            ),
        ],
    ),
]
