"""Forward, backward and replay against the CPU reference: the same
weights, tokens and routes in a process that sees no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, of log-probabilities and of gradients; replayed routes


def outcome(dtype: str, experts: str, routes: torch.Tensor | None) -> dict[str, Any]:
    """Log-probabilities, own routes and gradients of one pack; `routes` None records."""
    from tools.bench.gpu.common import TINY, describe_profile, engine_of, packs_of

    torch.backends.cuda.matmul.allow_tf32 = False
    options = [f"engine.dtype={dtype}", f"engine.experts={experts}", "replay.mode=R3"]
    _, engine = engine_of(TINY, options, train=True)
    packs = packs_of(engine, 256, 96)
    if routes is None:
        engine.logprobs(packs, "record")
        routes = packs[0].passes.live_routes
    packs[0].rollout.routes = routes
    [(logprobs, entropy)] = engine.logprobs(packs, "replay")
    engine.gradients(packs, "replay", _loss)
    grads = {param.name: tensor.main_grad.detach().float().cpu() for param, tensor in engine.model.params()}
    return {
        "profile": describe_profile(engine),
        "logprobs": logprobs.cpu(),
        "entropy": entropy.cpu(),
        "routes": routes,
        "live_routes": packs[0].passes.live_routes,
        "grads": grads,
    }


def _loss(pack: Any, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    weight = (pack.rollout.advantages * pack.mask / pack.rows).to(logprobs.device)
    return -(logprobs * weight).sum() + 0.01 * entropy.mean(), {}


def run(smoke: bool) -> Iterator[dict[str, Any]]:
    from tools.bench.gpu.common import relative

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.pt"
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "tools.bench.gpu.correctness", str(path)], env=env, check=True)
        reference = torch.load(path, weights_only=False)
    yield {"limits": LIMITS}
    passed = []
    for dtype in ("float32", "bfloat16"):
        for experts in ("grouped", "sequential"):
            result = outcome(dtype, experts, reference["routes"])
            worst = {name: relative(grad, reference["grads"][name]) for name, grad in result["grads"].items()}
            worst_name = max(worst, key=lambda name: worst[name])
            row: dict[str, Any] = {
                "dtype": dtype,
                "experts": experts,
                "profile": result["profile"],
                "logprobs": relative(result["logprobs"], reference["logprobs"]),
                "entropy": relative(result["entropy"], reference["entropy"]),
                "gradient_worst": worst[worst_name],
                "gradient_worst_name": worst_name,
                "gradient": relative(
                    *(torch.cat([g[n].flatten() for n in worst]) for g in (result["grads"], reference["grads"]))
                ),
                "own_routes_equal": float(
                    (result["live_routes"].sort(-1).values == reference["live_routes"].sort(-1).values)
                    .all(-1)
                    .float()
                    .mean()
                ),
            }
            row["passed"] = max(row["logprobs"], row["entropy"], row["gradient"]) <= LIMITS[dtype]
            passed.append(row["passed"])
            yield {"row": row}
    yield {"passed": all(passed)}


if __name__ == "__main__":
    torch.save(outcome("float32", "sequential", None), sys.argv[1])
