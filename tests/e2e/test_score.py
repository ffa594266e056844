"""sft -> generate -> score: the numbers of both engines on one checkpoint, with transformers as their judge."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import TP2_PP2_EP2, Bench
from tests.engine.support import judged

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def config(cold: Path) -> dict[str, Any]:
    return {
        **TP2_PP2_EP2,
        "model": {"path": str(cold)},
        "batch": {"group": 4},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 9, "temperature": TEMPERATURE},
        "score": {"temperature": TEMPERATURE},
    }


@pytest.fixture(scope="module")
def generated(bench: Bench, config: dict[str, Any]) -> Path:
    """What `megarl generate` wrote, then the same rows without routes, then some tokens that no model would say."""
    out = bench.folder / "generated.jsonl"
    bench.finish(
        "generate", "score", config, "--input", str(bench.folder / "data" / "valid.jsonl"), "--output", str(out)
    )
    rows = read(out)
    assert len(rows) == 64 and {row["finish_reason"] for row in rows} <= {"stop", "length"}
    prompts = read(bench.folder / "data" / "valid.jsonl")
    for row, given in zip(rows, [prompt for prompt in prompts for _ in range(4)]):  # fault 17: rows to read
        assert (row["prompt"], row["answer"]) == (given["prompt"], given["answer"])
        assert row["reward"] == float(row["text"].strip() == row["answer"])
    rng = np.random.default_rng(0)
    noise = [{"tokens": rng.integers(0, 32, length).tolist(), "prompt_len": 1} for length in (2, 3, 31, 64, 200)]
    both = bench.folder / "both.jsonl"
    both.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, *({**row, "routes": None} for row in rows), *noise])
    )
    return both


def test_score_agrees_with_transformers_and_with_generate(
    bench: Bench, config: dict[str, Any], cold: Path, generated: Path
) -> None:
    out = bench.folder / "scored.jsonl"
    config = {**config, "replay": {"mode": "R3"}, "engine": {"micro_batch_tokens": 64}}  # several chunks
    bench.finish("score", "score", config, "--input", str(generated), "--output", str(out))
    rows, scored = read(generated), read(out)
    assert len(scored) == len(rows) == 2 * 64 + 5
    worst = replayed = 0.0
    for row, answer in zip(rows, scored):
        assert all(row.get(key) == answer.get(key) for key in ("prompt", "text", "answer", "reward"))
        logprobs, experts = judged(cold, row["tokens"], TEMPERATURE)
        ours = np.array(answer["logprobs"])
        worst = max(worst, float(np.abs(ours - logprobs).max()))
        np.testing.assert_array_equal(np.sort(unpack(answer["routes"]), -1), experts)
        if "logprobs" in row:
            replayed = max(replayed, float(np.abs(ours[row["prompt_len"] - 1 :] - np.array(row["logprobs"])).max()))
        assert (
            len(answer["entropy"]) == len(row["tokens"]) - 1
            and 0 <= min(answer["entropy"]) <= max(answer["entropy"]) <= np.log(32) + 1e-6
        )
    print(f"megarl score against transformers: max |d| {worst:.2e}; against vLLM, its routes replayed: {replayed:.2e}")
    assert worst <= 1e-5 and replayed <= 1e-4


def test_routes_without_a_replay_mode_are_refused(bench: Bench, config: dict[str, Any], generated: Path) -> None:
    config = {key: value for key, value in config.items() if key not in ("parallel", "launch")}
    out = bench.folder / "refused.jsonl"
    command = bench.start(
        "score", "refused", {**config, "replay": {"mode": "none"}}, "--input", str(generated), "--output", str(out)
    )
    assert command.wait() == 2
    assert (
        command.err
        == f"megarl: error: {generated} line 1 has routes, but replay.mode is none; set replay.mode=R3 or drop them\n"
    )
    assert command.processes() == {} and not out.exists()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def unpack(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)))
