"""Run folders as training leaves them, from a formula: what the report's tests and its pictures look at."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from megarl.observe.metrics import MetricsLogger
from megarl.observe.samples import Sample
from megarl.observe.token_samples import write_token_samples
from megarl.observe.worst import write_worst

LAYERS = 12


def row(step: int, steps: int, noise: random.Random, *, precision: str, minibatches: int, ill: float) -> dict[str, Any]:
    """One step. ill: from 0, sound, to 1, wholly collapsed: what docs/stability.md tells of such a run."""
    done = step / steps
    reward = max(0.02, (0.1 + 0.8 * (1 - math.exp(-4 * done))) * (1 - 0.95 * ill) + noise.gauss(0, 0.02))
    k3 = {"float32": 1e-13, "bfloat16": 1e-4, "int4": 1e-2}[precision] * math.exp(noise.gauss(0, 0.3) + 4 * ill)
    agree = {"float32": 1.0, "bfloat16": 0.995, "int4": 0.92}[precision] - 0.1 * ill
    clip = 0.0 if minibatches == 1 else 0.004 * minibatches * (1 + 20 * ill)
    entropy = 1.0 * math.exp(-2 * done) + 1.2 * ill
    values: dict[str, Any] = {
        "reward/mean": reward,
        "reward/std": math.sqrt(reward * (1 - min(reward, 0.99))),
        "reward/pass_at_g": min(1.0, 1.3 * reward),
        "response/length_mean": 180 + 40 * done + 60 * ill,
        "response/truncated_frac": max(0.0, 0.01 + 0.4 * ill + abs(noise.gauss(0, 0.005))),
        "response/tokens": 23000.0 + noise.gauss(0, 900),
        "response/empty": 0.0,
        "policy/entropy": entropy + noise.gauss(0, 0.01),
        "mismatch/kl_k1": noise.gauss(0, k3),
        "mismatch/kl_k3": k3,
        "mismatch/abs_logprob_diff_max": 12 * math.sqrt(k3),
        "mismatch/extreme_frac_2": 0.0 if precision == "float32" else min(0.3, 0.6 * k3),
        "mismatch/is_weight_mean": 1 + noise.gauss(0, math.sqrt(k3) / 50),
        "mismatch/is_truncated_frac": 0.0,
        "loss/value": noise.gauss(0, 0.02),
        "loss/weight_mean": 1 + noise.gauss(0, 0.002),
        "loss/weight_truncated_frac": 0.0,
        "staleness/kl_k3": 0.0 if minibatches == 1 else 1e-4 * math.exp(noise.gauss(0, 0.2) + 3 * ill),
        "staleness/ratio_max": 1.0 if minibatches == 1 else 1.4 + 0.3 * abs(noise.gauss(0, 1)) + 4 * ill,
        "staleness/clip_frac_pos": clip * (0.4 + 0.1 * noise.random()),
        "staleness/clip_frac_neg": clip * (0.8 + 0.2 * noise.random()),
        "routing/agree_rollout_old": agree + noise.gauss(0, 0.0005) * (precision != "float32"),
        "routing/agree_old_current": 1.0 if minibatches == 1 else 0.985 - 0.05 * ill,
        "routing/any_layer_differs_frac": 1 - agree**LAYERS,
        "routing/layer_agreement": [min(1.0, agree - 0.02 * (1 - agree) * i * (1 + 3 * done)) for i in range(LAYERS)],
        "routing/worst_gap": 0.02 * abs(noise.gauss(1, 0.2)),
        "routing/bytes_ingested": 2.2e6,
        "routing/bytes_received_per_rank": 1.1e6,
        "routing/missing_rows": 0.0,
        "optim/grad_norm": 1.3 * math.exp(noise.gauss(0, 0.25)) * (1 + 3 * done),
        "optim/lr": 5e-4 * min(1.0, step / 20),
        "batch/groups": 16.0,
        "batch/equal_groups": float(round(2 + 6 * done + 6 * ill)),
        "batch/refilled_groups": 0.0,
        "batch/bad_samples": 0.0,
        "batch/skipped_updates": 0.0,
        "sync/bytes": 4.1e6,
        "sync/canary_max_diff": {"float32": 4e-6, "bfloat16": 0.03, "int4": 0.04}[precision],
        "time/rollout_s": 9.0 + noise.gauss(0, 0.4) + 2 * ill,
        "time/old_logprob_s": 0.0 if minibatches == 1 else 1.4,
        "time/update_s": 4.2 + noise.gauss(0, 0.1),
        "time/sync_s": 0.8,
        "time/step_s": 16.0 + noise.gauss(0, 0.5) + 2 * ill,
        "version/weights": float(step * minibatches),
        "version/rollout_lag_max": 0.0,
    }
    if noise.random() < 0.01:
        values["optim/grad_norm"] *= 400
    values["throughput/tokens_per_s"] = values["response/tokens"] / values["time/step_s"]
    values["throughput/train_tokens_per_s"] = values["response/tokens"] / values["time/update_s"]
    if step % 20 == 0:
        values |= {"eval/mean_at_k": 0.95 * reward, "eval/pass_at_k": min(1.0, 1.2 * reward), "eval/k": 4.0}
    return values


def sample(step: int, number: int, noise: random.Random, reward: float) -> Sample:
    """A response of digit sums as the quickstart samples them; one digit a token."""
    digits = [noise.randrange(10) for _ in range(6)]
    sums = [sum(digits[: i + 1]) % 10 for i in range(6)]
    if noise.random() > reward:
        sums[-1] = (sums[-1] + 1) % 10
    return Sample(
        prompt=f"<b>sum</b> {''.join(map(str, digits))}=",
        tokens=[ord(str(digit)) for digit in sums],
        answer=str(sum(digits) % 10),
        reward=float(sums[-1] == sum(digits) % 10),
        finish_reason="stop",
        version=step,
        rollout=[-abs(noise.gauss(0, 0.5)) for _ in sums],
        number=number,
    )


def write_run(
    folder: Path,
    *,
    steps: int = 200,
    of: int | None = None,
    precision: str = "bfloat16",
    minibatches: int = 2,
    collapse_at: int | None = None,
    lr: float = 1e-5,
    seed: int = 0,
) -> Path:
    """A run that has done `steps` of `of` steps. collapse_at: the step from which it collapses, over an eighth."""
    noise = random.Random(seed)
    logger = MetricsLogger(folder)
    for step in range(1, steps + 1):
        ill = 0.0 if collapse_at is None else min(1.0, max(0.0, (step - collapse_at) / (steps / 8)))
        values = row(step, steps, noise, precision=precision, minibatches=minibatches, ill=ill)
        logger.log(step, values)
        token = {"difference": abs(noise.gauss(0, 0.5)), "rollout": -1.0, "trainer": -1.1, "before": "3;<b>4</b>;" * 6}
        write_worst(folder, step, [token | {"token": "7", "after": ";\nend"}], lambda text: text)  # type: ignore[arg-type, return-value]
        if step % 5 == 0:
            shown = [sample(step, number, noise, values["reward/mean"]) for number in range(4)]
            old = {s.number: [value + noise.gauss(0, 0.2) for value in s.rollout] for s in shown}
            write_token_samples(folder, step, shown, old, lambda tokens: "".join(map(chr, tokens)))
    logger.close()
    quantize = "int4" if precision == "int4" else "none"
    config = {
        "model": {"path": "models/tiny"},
        "engine": {"dtype": "float32" if precision == "float32" else "bfloat16"},
        "batch": {"minibatches": minibatches},
        "rollout": {"dtype": "auto"},
        "sync": {"quantize": quantize},
        "train": {"steps": of or steps, "lr": lr},
        "run": {"dir": str(folder)},
    }
    (folder / "config.yaml").write_text(json.dumps(config, indent=1))
    return folder
