"""`megarl compare` on real engines in two precisions: its figures, computed anew from its
responses by `megarl score`.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.conftest import Bench

TEMPERATURE = 0.8
TP2_DP2 = {"parallel": {"tp": 2, "ep": 2}, "launch": {"trainers": 4}}


def test_the_figures_are_those_of_generate_and_score(bench: Bench) -> None:
    """Fault 6: under sync.quantize, which once was ignored, the rollouts are those of the quantised weights."""
    config: dict[str, Any] = {
        **TP2_DP2,
        "model": {"path": str(bench.folder / "model")},
        "data": {"prompts": str(bench.folder / "data" / "valid.jsonl"), "reward": "digit_sum"},
        "batch": {"prompts": 16, "group": 4, "minibatches": 4},
        "engine": {"micro_batch_tokens": 128},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 12, "temperature": TEMPERATURE, "dtype": "bfloat16"},
        "sync": {"quantize": "int4"},
        "score": {"temperature": TEMPERATURE},
    }
    command = bench.finish("compare", "compare", config)
    folder = bench.folder / "compare"
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith((".", "logs"))) == [
        "compare.html",
        "compare.json",
        "compare.jsonl",
    ]
    report, rows = json.loads((folder / "compare.json").read_text()), read(folder / "compare.jsonl")
    assert (
        len(rows) == report["responses"] == 64 and "k3" in command.out and str(folder / "compare.html") in command.out
    )

    # the same responses through `megarl score` on one rank: with their routes, and without
    both = bench.folder / "compared.jsonl"
    both.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *({**row, "routes": None} for row in rows)]))
    out = bench.folder / "compared.scored.jsonl"
    single = {**config, "parallel": {}, "launch": {"trainers": 1}, "replay": {"mode": "R3"}}
    bench.finish("score", "scored", single, "--input", str(both), "--output", str(out))
    scored = read(out)
    mu = np.concatenate([row["logprobs"] for row in rows])
    for which, answers in (("replayed", scored[:64]), ("live", scored[64:])):
        log_rho = (
            np.concatenate([np.array(a["logprobs"])[row["prompt_len"] - 1 :] for row, a in zip(rows, answers)]) - mu
        )
        k3 = np.expm1(log_rho) - log_rho
        want = {
            "mismatch/kl_k1": -log_rho.mean(),
            "mismatch/kl_k3": k3.mean(),
            "mismatch/abs_logprob_diff_max": np.abs(log_rho).max(),
            "mismatch/extreme_frac_2": (np.abs(log_rho) > np.log(2)).mean(),
            "mismatch/ratio_mean": np.exp(log_rho).mean(),
        }
        for key, value in want.items():
            np.testing.assert_allclose(report[which][key], value, rtol=1e-3, atol=2e-6, err_msg=f"{which} {key}")
    agree = np.concatenate([shares(row, answer) for row, answer in zip(rows, scored[64:])])
    np.testing.assert_allclose(report["live"]["routing/layer_agreement"], agree.mean(0), atol=1e-6)
    np.testing.assert_allclose(report["live"]["routing/any_layer_differs_frac"], (agree < 1).any(1).mean(), atol=1e-6)

    live, replayed = report["live"], report["replayed"]
    assert live["mismatch/kl_k3"] > 1e-4 and "weights sent in int4" in command.out  # bfloat16 alone: 1e-6
    assert live["routing/agree_rollout_old"] < 1 and live["routing/worst_gap"] > 0, (
        "bfloat16 rollouts route some tokens otherwise"
    )
    assert 0 < replayed["mismatch/kl_k3"] <= live["mismatch/kl_k3"]
    worst = report["worst"][0]
    np.testing.assert_allclose(worst["difference"], live["mismatch/abs_logprob_diff_max"], rtol=1e-6)
    page = (folder / "compare.html").read_text()
    assert page.count("https:") == page.count("https://github.com/leeoniya/uPlot") == 1
    assert page.count("<mark>") == len(report["worst"]) and "verdict: " in command.out
    print(command.out)


def shares(row: dict[str, Any], answer: dict[str, Any]) -> np.ndarray:
    """[n, L]: of the rollout's experts of each row that predicts a response token, those that the trainer chose."""
    rollout, own = (unpack(x["routes"])[row["prompt_len"] - 1 :] for x in (row, answer))
    return (rollout[..., :, None] == own[..., None, :]).any(-1).mean(-1)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def unpack(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)))
