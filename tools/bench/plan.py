"""What it takes to plan a resharded sync of a large model, and how good
the plan is. Nothing is run; sizes are in the file.

    python tools/bench/plan.py [--model qwen3-235b|kimi-1t] [--bucket-mib N] [--json]

qwen3-235b: Qwen3-235B-A22B, 1,024 trainer ranks (TP4 PP8 EP16) into 256 rollout ranks (32 engines of TP8).
kimi-1t: Kimi-K2 (DeepSeek-V3's architecture, 384 experts), 2,048 trainer ranks (TP8 PP16 EP32) into 512 rollout ranks
(EP16 over TP8).
sender_in_step_over_max: what it would cost the senders if nobody began a bucket before all have ended the one before;
sender_in_step_over_receiver: the same over what the fullest receiver takes. --bucket-mib: buckets of that size, not of
a sync's.
Seconds are of the processor, one thread. The bound of a receiver is what it holds; of a sender, what its stage owes
over the stage's ranks, where no rollout rank passes on what it received (Plan.least_sent).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megarl.weights.map.layout import Layout  # noqa: E402
from megarl.weights.map.weight_map import WeightMap  # noqa: E402
from megarl.weights.reshard.plan import Plan, make_plan  # noqa: E402
from megarl.weights.reshard.rollout_layout import RolloutLayout  # noqa: E402

QWEN3_235B = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}
KIMI_1T = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rms_norm_eps": 1e-6,
    "vocab_size": 163840,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
}
CASES: dict[str, tuple[dict[str, Any], Layout, RolloutLayout]] = {
    "qwen3-235b": (
        QWEN3_235B,
        Layout(tp=4, pp=8, ep=16, first_stage_layers=11, last_stage_layers=11, world=1024),
        RolloutLayout(32, 8),
    ),
    "kimi-1t": (
        KIMI_1T,
        Layout(tp=8, pp=16, ep=32, first_stage_layers=3, last_stage_layers=2, world=2048),
        RolloutLayout(32, 8, ep=16),
    ),
}


def measure(hf: dict[str, Any], train: Layout, rollout: RolloutLayout, bucket_bytes: int | None) -> dict[str, Any]:
    start = time.process_time()
    plan = make_plan(train, rollout, WeightMap(hf), bucket_bytes=bucket_bytes)
    planned = time.process_time()
    load = plan.load
    summed = time.process_time()
    held_bytes = plan.held_bytes()
    return {
        "plan_s": planned - start,
        "figures_s": summed - planned,
        "sends_of_a_rank_s": _seconds(plan, trainer=True),
        "receives_of_a_rank_s": _seconds(plan, trainer=False),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "buckets": plan.buckets,
        "messages": load.messages,
        "sender_max_gib": float(load.sent.max() / 2**30),
        "sender_mean_gib": float(load.sent.mean() / 2**30),
        "sender_bound_gib": plan.least_sent() / 2**30,
        "receiver_max_gib": float(load.received.max() / 2**30),
        "receiver_bound_gib": float(held_bytes.max() / 2**30),
        "sender_max_over_mean": float(load.sent.max() / load.sent.mean()),
        "sender_max_over_bound": float(load.sent.max() / plan.least_sent()),
        "sender_in_step_over_max": float(load.lockstep / load.sent.max()),
        "sender_in_step_over_receiver": float(load.lockstep / load.received.max()),
        "sent_over_held": float(load.sent.sum() / held_bytes.sum()),
        "destinations_per_sender": int((load.pairs > 0).sum(1).max()),
        "sources_per_receiver": int((load.pairs > 0).sum(0).max()),
    }


def _seconds(plan: Plan, trainer: bool) -> float:
    start = time.process_time()
    for _ in plan.sends(plan.train.world // 2) if trainer else plan.receives(plan.rollout.world // 2):
        pass
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CASES), default="qwen3-235b")
    parser.add_argument("--bucket-mib", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = measure(*CASES[args.model], args.bucket_mib and args.bucket_mib * 2**20)
    if args.json:
        print(json.dumps({"model": args.model, **figures}))
        return
    for name, value in figures.items():
        print(f"{name:24} {value:14,.4f}" if isinstance(value, float) else f"{name:24} {value:14,}")


if __name__ == "__main__":
    main()
