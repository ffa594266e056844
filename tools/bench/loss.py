"""Loss and metrics of packed tokens, forward and backward: time and peak memory of policy_loss against a plain
expression of the formula.

    python tools/bench/loss.py [--tokens 131072] [--preset minirl] [--repeat 30] [--json FILE]

The plain variant is MiniRL's loss and the same metrics (loss/*, staleness/*, mismatch/*,
policy/entropy) as one would write them down for one rank, with the k3 estimates in float64 as
here. Runs are interleaved; times are medians. Memory is the largest sum of living allocations
beyond the inputs, from torch's profiler on a CPU, from the allocator on a GPU (not yet run).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from megarl.objective import finish, merge, mismatch_metrics, policy_loss, presets  # noqa: E402

Data = dict[str, Tensor]
Metrics = dict[str, float]


def packed(tokens: int, device: str) -> Data:
    """Responses of 256 to 4,096 tokens behind prompts of 64, one after the other."""
    generator = torch.Generator().manual_seed(0)
    index, mask = torch.empty(0, dtype=torch.long), torch.empty(0)
    while len(index) < tokens:
        length = int(torch.randint(256, 4096, (), generator=generator))
        index = torch.cat([index, torch.full((64 + length,), int(index[-1]) + 1 if len(index) else 0)])
        mask = torch.cat([mask, torch.zeros(64), torch.ones(length)])
    index, mask = index[:tokens], mask[:tokens]
    old = -3 * torch.rand(tokens, generator=generator)
    noise = torch.randn(2, tokens, generator=generator) * 0.1
    data = {
        "logprobs": old + noise[0],
        "old_logprobs": old,
        "rollout_logprobs": old + noise[1],
        "advantages": torch.randn(int(index[-1]) + 1, generator=generator)[index],
        "mask": mask,
        "seq_ids": index,
        "entropy": torch.rand(tokens, generator=generator),
        "denominator": torch.full((tokens,), float(index[-1] + 1)),
    }
    data = {key: value.to(device) for key, value in data.items()}
    data["logprobs"].requires_grad_()
    return data


def ours(data: Data, preset: str) -> tuple[Tensor, Metrics]:
    inputs = dict(data)
    config, entropy, denominator = presets[preset], inputs.pop("entropy"), inputs.pop("denominator")
    loss, sums = policy_loss(
        *inputs.values(), config, group_ids=data["seq_ids"] // 8, entropy=entropy, denominator=denominator
    )
    loss.backward()
    return loss, finish(
        merge(sums, mismatch_metrics(data["old_logprobs"], data["rollout_logprobs"], data["mask"], config.is_cap))
    )


def plain(data: Data, preset: str) -> tuple[Tensor, Metrics]:
    """MiniRL, arXiv 2512.01374 eq 7, and the metrics of docs/objective.md. `preset` is not looked at."""
    logp, old, mu, adv, mask = (
        data[key] for key in ("logprobs", "old_logprobs", "rollout_logprobs", "advantages", "mask")
    )
    ratio = (logp - old).exp().detach()
    importance = (logp - mu).exp().detach()
    weight = importance.clamp(max=5.0)
    clip_pos, clip_neg = (adv > 0) & (ratio > 1.27), (adv < 0) & (ratio < 0.8)
    per_token = -mask * (~(clip_pos | clip_neg)) * weight * adv * logp
    loss = (per_token / data["denominator"]).sum()
    loss.backward()
    tokens = mask.sum()
    log_r, log_rho = (logp.detach() - old).double(), (old - mu).double()
    rho = log_rho.exp()
    metrics = {
        "loss/value": per_token.detach().sum() / data["seq_ids"].unique().numel(),
        "loss/weight_mean": (mask * weight).sum() / tokens,
        "loss/weight_truncated_frac": (mask * (importance > 5.0)).sum() / tokens,
        "staleness/kl_k3": (mask * (torch.expm1(log_r) - log_r)).sum() / tokens,
        "staleness/ratio_max": (mask * ratio).max(),
        "staleness/clip_frac_pos": (mask * clip_pos).sum() / tokens,
        "staleness/clip_frac_neg": (mask * clip_neg).sum() / tokens,
        "policy/entropy": (mask * data["entropy"]).sum() / tokens,
        "mismatch/kl_k1": -(mask * log_rho).sum() / tokens,
        "mismatch/kl_k3": (mask * (torch.expm1(log_rho) - log_rho)).sum() / tokens,
        "mismatch/abs_logprob_diff_max": (mask * log_rho.abs()).max(),
        "mismatch/extreme_frac_2": (mask * (torch.maximum(rho, 1 / rho) > 2)).sum() / tokens,
        "mismatch/is_weight_mean": (mask * rho.clamp(max=5.0)).sum() / tokens,
        "mismatch/is_truncated_frac": (mask * (rho > 5.0)).sum() / tokens,
    }
    return loss, {key: float(value) for key, value in metrics.items()}


def seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()  # ends with numbers on the host
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object]) -> int:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    moves = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = most = 0
    for event in sorted(moves, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--preset", default="minirl", choices=list(presets))
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = packed(args.tokens, "cuda" if torch.cuda.is_available() else "cpu")
    variants = {"ours": ours, "plain": plain}
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks, results = {}, {}
    for name, variant in variants.items():
        data["logprobs"].grad = None
        loss, metrics = variant(data, args.preset)  # warm-up
        assert data["logprobs"].grad is not None
        results[name] = (loss.item(), metrics, data["logprobs"].grad.clone())
        data["logprobs"].grad = None
        peaks[name] = peak_bytes(partial(variant, data, args.preset))
    for _ in range(args.repeat):
        for name, variant in variants.items():
            data["logprobs"].grad = None
            times[name].append(seconds(partial(variant, data, args.preset)))
    if args.preset == "minirl":
        torch.testing.assert_close(results["ours"][2], results["plain"][2])
        assert all(
            abs(value - results["plain"][1][key]) <= 1e-4 * (1e-2 + abs(value))
            for key, value in results["ours"][1].items()
        )
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {"time": median["ours"] / median["plain"], "memory": peaks["ours"] / peaks["plain"]}
    for name in variants:
        print(f"{name:6} {1e3 * median[name]:7.2f} ms  {peaks[name] / 2**20:6.2f} MiB")
    print(
        f"ratio  {ratios['time']:7.2f}     {ratios['memory']:6.2f}      ({args.preset}, {args.tokens} tokens, float32)"
    )
    if args.json:
        work = {"tokens": args.tokens, "preset": args.preset}
        args.json.write_text(
            json.dumps({**work, "seconds": median, "bytes": peaks, "ratio": ratios}) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
