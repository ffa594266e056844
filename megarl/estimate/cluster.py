"""`megarl plan`: what a run would take, from config.json and the layout
alone: memory of the ranks, bytes and seconds of a weight sync.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megarl.config import Config
from megarl.estimate.memory import GIB, Training, room, stage_memory, verdict
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap, load_hf_config
from megarl.weights.reshard.plan import Plan, make_plan
from megarl.weights.reshard.rollout_layout import RolloutLayout

ITEMSIZE = {"auto": 2, "bfloat16": 2, "float32": 4}  # a plan is for a cluster: auto is bfloat16 there


@dataclass(frozen=True)
class Hosts:
    """gpus: ranks a host. link: GB/s (1e9 bytes) of each rank's own
    network link, in each direction; a host has one link a rank.
    """

    gpus: int
    link: float


def plan_run(config: Config, world: int, rollout_ep: int, hosts: Hosts) -> dict[str, Any]:
    """Figures of a run of `world` trainer ranks and rollout.engines
    servers; trainers and servers on hosts of their own. Bytes, seconds.

    The keys are stable.
    """
    weight_map = WeightMap(load_hf_config(config.model.path))
    layout = Layout(**config.parallel.model_dump(), world=world)
    trained = ITEMSIZE[config.engine.dtype]
    training = training_of(config, layout, trained)
    plan = sync_plan(config, layout, weight_map, rollout_ep)
    rollout, (sync, rank_weights) = plan.rollout, _sync(plan, hosts)
    stages = []
    for stage, kept in enumerate(kept_by_stage(config, plan)):
        memory = replace(stage_memory(weight_map, training, stage), sync=kept)
        layers = (
            layout.stage_sizes(weight_map.num_layers)[stage] if layout.vpp == 1 else weight_map.num_layers // layout.pp
        )
        stages.append({"stage": stage, "layers": layers, **asdict(memory), "total": memory.total})
    return {
        "model": {
            "parameters": sum(int(np.prod(shape)) for shape in weight_map.hf_shapes.values()),
            "tensors": len(weight_map.hf_shapes),
        },
        "train": {
            "ranks": world,
            "dp": layout.dp,
            "edp": layout.edp,
            "itemsize": trained,
            "critic": training.critic,
            "stages": stages,
        },
        "rollout": {
            "ranks": rollout.world,
            "engines": rollout.engines,
            "itemsize": _rollout_itemsize(config),
            "weights": rank_weights,
        },
        "sync": sync,
    }


def sync_plan(config: Config, layout: Layout, weight_map: WeightMap, rollout_ep: int) -> Plan:
    rollout = RolloutLayout(config.rollout.engines, config.rollout.tp, rollout_ep)
    return make_plan(layout, rollout, weight_map, itemsize=_rollout_itemsize(config))


def _rollout_itemsize(config: Config) -> int:
    return ITEMSIZE[config.rollout_dtype(on_gpu=True)]


def kept_by_stage(config: Config, plan: Plan) -> list[int]:
    """Bytes of messages that the fullest rank of each stage keeps from one weight sync to the next."""
    if config.sync.transport != "reshard":
        return [0] * plan.train.pp
    return [int(most) for most in plan.kept_bytes().reshape(plan.train.pp, -1).max(1)]


def training_of(config: Config, layout: Layout, itemsize: int) -> Training:
    engine = config.engine
    return Training(
        layout,
        itemsize,
        engine.distributed_optimizer,
        engine.recompute,
        engine.micro_batch_tokens,
        engine.optimizer_offload_fraction,
        config.objective.advantage == "gae",
        bool(config.objective.kl_coef),
    )


def _sync(plan: Plan, hosts: Hosts) -> tuple[dict[str, Any], int]:
    """Figures of one resharded sync, and the bytes of weights on the fullest rollout rank."""
    load, held_bytes = plan.load, plan.held_bytes()
    out = np.add.reduceat(load.sent, np.arange(0, plan.train.world, hosts.gpus))
    into = np.add.reduceat(load.received, np.arange(0, plan.rollout.world, hosts.gpus))
    link = hosts.link * 1e9
    busiest = max(int(load.sent.max()), int(load.received.max()))
    bound = max(plan.least_sent(), int(held_bytes.max()))
    sync = {
        "bytes": int(load.sent.sum()),
        "bytes_over_held": float(load.sent.sum() / held_bytes.sum()),
        "sender_max": int(load.sent.max()),
        "sender_mean": float(load.sent.mean()),
        "sender_bound": plan.least_sent(),
        "receiver_max": int(load.received.max()),
        "receiver_bound": int(held_bytes.max()),
        "host_out_max": int(out.max()),
        "host_in_max": int(into.max()),
        "messages": load.messages,
        "buckets": plan.buckets,
        "link_gbs": hosts.link,
        "gpus_per_host": hosts.gpus,
        "seconds": busiest / link,
        "seconds_bound": bound / link,
    }
    return sync, int(held_bytes.max())


def needed(plan: dict[str, Any]) -> int:
    """Bytes of the fullest stage's ranks."""
    return max(stage["total"] for stage in plan["train"]["stages"])


def describe(plan: dict[str, Any], gpu: float) -> str:
    """The figures as tables. gpu: bytes."""
    train, rollout, sync = plan["train"], plan["rollout"], plan["sync"]
    both = ", policy and critic together" if train["critic"] else ""
    columns = "parameters gradients optimizer sync activations logits temporaries save total host".split()
    lines = [
        f"{plan['model']['parameters'] / 1e9:,.2f} billion parameters in {plan['model']['tensors']:,} tensors",
        "",
        f"trainer: {train['ranks']:,} ranks (dp {train['dp']}, expert dp {train['edp']}), GiB a rank{both}; "
        "activations, logits and temporaries are estimates, and a step takes the larger of the last two; the total "
        "is that of a step, or of a checkpoint, which needs save in their place; sync: messages that the "
        "stage's fullest rank keeps from one weight sync to the next; host: host memory of the optimizer and of the "
        "reference model",
        f"{'stage':>5} {'layers':>6} " + " ".join(f"{name:>11}" for name in columns),
    ]
    for stage in train["stages"]:
        lines.append(
            f"{stage['stage']:>5} {stage['layers']:>6} " + " ".join(f"{stage[name] / GIB:>11.3f}" for name in columns)
        )
    lines += [
        "",
        verdict(needed(plan), gpu),
        "",
        f"rollout: {rollout['ranks']:,} ranks in {rollout['engines']:,} engines, {rollout['weights'] / GIB:.3f} GiB "
        "of weights a rank",
        "",
        f"weight sync: {sync['bytes'] / GIB:,.3f} GiB in {sync['messages']:,} messages, {sync['buckets']:,} buckets; "
        f"{sync['bytes_over_held']:.2f} of what the rollout ranks hold",
        f"{'GiB':>24} {'most':>11} {'bound':>11}",
        f"{'out of a trainer rank':>24} {sync['sender_max'] / GIB:>11.3f} {sync['sender_bound'] / GIB:>11.3f}",
        f"{'into a rollout rank':>24} {sync['receiver_max'] / GIB:>11.3f} {sync['receiver_bound'] / GIB:>11.3f}",
        f"{'out of a trainer host':>24} {sync['host_out_max'] / GIB:>11.3f}",
        f"{'into a rollout host':>24} {sync['host_in_max'] / GIB:>11.3f}",
        f"at {sync['link_gbs']:g} GB/s a rank, {sync['gpus_per_host']} ranks a host: {sync['seconds']:.3f} s for "
        f"the busiest rank's bytes, without latency; the bound {sync['seconds_bound']:.3f} s holds where every byte "
        "goes straight from a "
        "trainer to each rollout rank that keeps it (one that rollout ranks pass on to one another costs the "
        "trainers less)",
    ]
    return "\n".join(lines)


def run(config: Config, world: int, rollout_ep: int, hosts: Hosts, gpu: float, as_json: bool) -> int:
    """0 where it fits a GPU of so many bytes, 1 where it does not."""
    plan = plan_run(config, world, rollout_ep, hosts)
    fits = needed(plan) <= room(gpu)
    print(json.dumps(plan | {"fits": fits}) if as_json else describe(plan, gpu))
    return 0 if fits else 1
