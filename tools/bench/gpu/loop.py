"""The whole loop on one GPU that trainer and rollout server share (launch.colocate): seconds a step and where they go,
and how far the two engines' probabilities lie apart, by replay mode.

Random weights: the quickstart's model (tiny), 24 layers of 64 experts (deep), and two layers of Qwen3-30B-A3B at its
true widths (slice). It needs vLLM. The rewards tell nothing, but differ within a group: every step has an update.
LOOP_OVERRIDES: further key=value of megarl run, e.g. rollout.enforce_eager=true.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.bench.gpu.roofline import QWEN3_30B_A3B

ROOT = Path(__file__).resolve().parents[3]
WARM_UP = 2
LOG_CHARACTERS = 12_000
WIDTHS = """hidden_size intermediate_size moe_intermediate_size num_experts num_experts_per_tok num_attention_heads
    num_key_value_heads head_dim""".split()
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "deep": dict(
        layers=24,
        hidden=1024,
        experts=64,
        top_k=8,
        moe_intermediate=256,
        heads=16,
        kv_heads=4,
        head_dim=64,
        vocab_size=32_768,
        dtype="bfloat16",
        initializer_range=0.05,
    ),
    "slice": dict(
        vocab_size=QWEN3_30B_A3B["vocab_size"],
        dtype="bfloat16",
        initializer_range=0.02,
        changes={key: QWEN3_30B_A3B[key] for key in WIDTHS} | {"num_hidden_layers": 2},
    ),
}
# model, replay, prompts of a step (8 responses each), tokens of a response at most, steps
CASES = [
    ("tiny", "R3", 16, 16, 8),
    ("slice", "R3", 16, 512, 5),
    ("deep", "R3", 8, 256, 5),
    ("deep", "none", 8, 256, 5),
]
LIMIT_S = 190  # of a run; one that is stopped leaves its logs


def configuration(folder: Path, replay: str, prompts: int, tokens: int, smoke: bool) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model")},
        "data": {"prompts": str(folder / "data" / "train.jsonl"), "reward": "tools.bench.tail_task.parity"},
        "batch": {"prompts": prompts, "group": 8, "minibatches": 2},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": tokens},
        "replay": {"mode": replay},
        "train": {"steps": 1000, "lr": 1e-5},
        "engine": {"micro_batch_tokens": 16_384, "dtype": "float32" if smoke else "bfloat16"},
        "launch": {"trainers": 1, "colocate": not smoke},
        "run": {"dir": str(folder / "run"), "preempt_s": 1},
    }


def run(smoke: bool, number: int) -> Iterator[dict[str, Any]]:
    from megarl.observe.metrics import read_metrics
    from tools.digit_sum import write_task

    model, replay, prompts, tokens, steps = CASES[number]
    if smoke:
        model, tokens = "tiny", 16
    yield {"model": model, "replay": replay, "prompts": prompts, "max_new_tokens": tokens}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _model(folder / "model", MODELS[model])
        write_task(folder / "data", digits=7)
        path = folder / "loop.yaml"
        path.write_text(yaml.safe_dump(configuration(folder, replay, prompts, tokens, smoke)), encoding="utf-8")
        overrides = os.environ.get("LOOP_OVERRIDES", "").split()
        command = [sys.executable, "-m", "megarl.cli", "run", str(path), *overrides]
        begun = time.monotonic()
        with open(folder / "said", "w", encoding="utf-8") as said:
            process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        rows: list[dict[str, Any]] = []
        while len(rows) < steps and process.poll() is None and time.monotonic() < begun + LIMIT_S:
            time.sleep(0.2)
            rows = read_metrics(folder / "run") if (folder / "run" / "metrics.jsonl").exists() else []
        process.terminate()  # before a last checkpoint, which at these sizes takes longer than the steps
        process.wait()
        logs = sorted((folder / "run" / "logs").glob("*.log"))
        yield {"logs": {log.name: log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:] for log in logs}}
        yield {"rows": [{"step": row["step"], **_figures(row)} for row in rows], "run_s": time.monotonic() - begun}
        if len(rows) < steps:
            last = (folder / "said").read_text(encoding="utf-8")[-1500:]
            raise RuntimeError(
                f"megarl run ended after {len(rows)} of {steps} steps, status {process.returncode}: {last}"
            )
    later = [_figures(row) for row in rows[WARM_UP:]]
    keys = list(dict.fromkeys(key for row in later for key in row))
    yield {"medians": {key: statistics.median(row[key] for row in later if key in row) for key in keys}}


def _model(path: Path, sizes: dict[str, Any]) -> None:
    import torch

    from tools.tiny_model import make_tiny_model

    with torch.device("cuda" if sizes else "cpu"):
        make_tiny_model(path, **sizes)


def _figures(row: dict[str, Any]) -> dict[str, float]:
    kinds = ("time/", "throughput/", "mismatch/", "sync/", "staleness/", "optim/", "response/", "routes/", "replay/")
    return {key: value for key, value in row.items() if key.startswith(kinds) and isinstance(value, int | float)}
