"""The engine on a simulated GPU, in layouts of every kind: no tensor on the wrong device, peak memory as it is planned,
waits of the host as they are listed, and bytes of every kind of collective as they are computed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

from megarl.config import load_config
from megarl.estimate.cluster import training_of
from megarl.estimate.memory import Training, stage_memory
from megarl.estimate.traffic import FLOAT, Sent, stage_traffic
from megarl.simulate.command import recompute_gain
from megarl.simulate.phases import POLICY, STEP
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="the simulated GPU needs torch's build for CPUs (megarl/simulate/shim.py)"
)

HIDDEN, EXPERTS, TOPK, WIDTH, TOKENS, VOCABULARY = 1024, 16, 4, 512, 2048, 32_000
KEYS = [
    "engine.dtype=bfloat16",
    "replay.mode=R3",
    f"engine.micro_batch_tokens={TOKENS}",
    "rollout.max_new_tokens=700",  # a pack holds one such response, and a shorter one
    "rollout.max_prompt_tokens=512",
]
SHARDED = "engine.distributed_optimizer=true"
LAYOUTS: dict[str, tuple[int, int, int, list[str]]] = {  # layers, world, rank, keys
    "dp": (2, 2, 0, []),
    "tp": (2, 2, 1, ["parallel.tp=2", SHARDED]),
    "pp": (2, 2, 0, ["parallel.pp=2"]),
    "vpp": (4, 2, 1, ["parallel.pp=2", "parallel.vpp=2"]),
    "ep": (2, 4, 3, ["parallel.ep=4"]),
    "etp": (2, 4, 0, ["parallel.tp=2", "parallel.ep=2", "parallel.etp=2"]),
    "cp": (2, 2, 1, ["parallel.cp=2", "engine.recompute=selective"]),
    "host": (2, 2, 0, [SHARDED, "engine.optimizer_offload_fraction=1", "engine.recompute=full"]),
    "deep": (6, 1, 0, []),
    "deep full": (6, 1, 0, ["engine.recompute=full"]),
    "first": (4, 16, 0, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=4", SHARDED]),
    "last": (
        2,
        16,
        15,
        ["parallel.tp=2", "parallel.pp=2", "parallel.ep=4", "parallel.cp=2", SHARDED, "engine.recompute=full"],
    ),
    "latent": (2, 8, 0, ["parallel.tp=2", "parallel.ep=4", SHARDED]),
    "latent full": (2, 4, 3, ["parallel.tp=2", "parallel.cp=2", "engine.recompute=full"]),
    "ppo": (2, 2, 0, ["objective=ppo", "objective.kl_coef=0.1", "rollout.max_lag=2", "batch.minibatches=2"]),
}

LATENT: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "rope_theta": 10_000.0,
}

DEEP, LAYERS = "deep", "single layers"
MINIBATCHES = {"ep": 2, "ppo": 2}  # one is enough elsewhere; with two there is a pi_old pass

# Where the host waits for the device, and how often: in each layer of a pass with experts, in each pack, pass, update
# and batch, for each parameter that is stepped on the host; old, values, lags: in a pi_old pass, in a critic's pass,
# for the figures by lag. The list only shrinks: what is not here fails, and so does what no layout reaches.
WAITS: dict[str, dict[str, int]] = {
    "event megatron/core/transformer/moe/token_dispatcher.py MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize": {
        "layer": 1
    },
    "nonzero megarl/objective/metrics.py unmasked": {"pack": 1},
    "stream megarl/engine/device.py to_host": {"pass": 1, "old": 1, "values": 1, "lags": 1, "batch": 2},
    "item megarl/engine/step.py Engine.finite_gradients": {"update": 1},
    "item megatron/core/optimizer/clip_grads.py get_grad_norm_fp32": {"update": 2},
    "event megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py HybridDeviceOptimizer.step": {"hosted": 1},
    "item megarl/loop/learn.py Learner._sound": {"update": 1, "batch": 1},
    "copy to the host megarl/loop/reduce.py over_ranks": {"batch": 4, "lags": 1},
    "copy to the host megarl/loop/reduce.py _on_host": {"batch": 1},
    "item megarl/loop/reduce.py rollout_routing": {"batch": 1},
    "broadcast_object_list megarl/loop/reduce.py reduce_sums": {"batch": 2},
    "gather_object megarl/observe/worst.py gather_notes": {"batch": 1},
}
GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "CONTEXT_PARALLEL_GROUP": "context",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tensor",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "experts",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EXPERT_DATA_PARALLEL_GROUP": "expert data",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "default_pg": "pipeline",
}
BALANCE = "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP"  # rows of each expert, an update
KINDS = ("allgather", "reduce_scatter", "allreduce", "alltoall", "send", "recv")
NORM = 8  # bytes an update: of dense and of expert gradients, the square of their norm


def model(name: str) -> dict[str, Any]:
    layers = LAYOUTS[name][0]
    return {
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2048,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOPK,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        **(LATENT if "latent" in name else {}),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each layout recorded: all in one process, for the seconds that importing the engine takes."""
    requests = []
    for name, (_, world, rank, keys) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(model(name)))
        given = [f"model.path={folder}", *KEYS, *keys]
        requests.append({"keys": given, "world": world, "rank": rank, "minibatches": MINIBATCHES.get(name, 1)})
        if name == DEEP:
            deep = folder
            requests.append(requests[-1] | {"recompute": True})
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    run = subprocess.run([sys.executable, "-m", "megarl.simulate"], input=lines, capture_output=True, text=True)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == len(requests), run.stderr[-3000:]
    layers = answers.pop(1 + list(LAYOUTS).index(DEEP))
    return dict(zip(LAYOUTS, answers, strict=True)) | {LAYERS: layers, "folder": deep}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_update_runs_and_no_tensor_is_on_the_wrong_device(found: dict[str, dict[str, Any]], name: str) -> None:
    assert "failed" not in found[name], found[name]["failed"]
    assert {"gradients", "optimizer step"} <= found[name]["peaks"].keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_peak_is_the_plan(found: dict[str, dict[str, Any]], name: str) -> None:
    planned = stage_memory(*trained(name))
    peak = found[name]["peaks"]["gradients"]["bytes"]
    assert abs(planned.step / peak - 1) < 0.05, (planned, peak)
    states = planned.parameters + planned.gradients + planned.optimizer  # most of these small models; not of large ones
    assert abs((planned.step - states) / (peak - states) - 1) < 0.1, (planned, peak)


def trained(name: str) -> tuple[WeightMap, Training, int]:
    layers, world, rank, keys = LAYOUTS[name]
    config = load_config(None, [*KEYS, *keys])
    layout = Layout(**config.parallel.model_dump(), world=world)
    return WeightMap(model(name)), training_of(config, layout, 2), layout.coord(rank).pp


def test_states_of_a_critic_are_counted(found: dict[str, dict[str, Any]]) -> None:
    planned = stage_memory(*trained("ppo"))
    states = planned.parameters + planned.gradients + planned.optimizer
    assert found["ppo"]["peaks"]["end"]["bytes"] == pytest.approx(states, rel=0.001)


def test_recompute_saves_and_costs_what_single_layers_say(found: dict[str, dict[str, Any]]) -> None:
    layers, world, rank, keys = LAYOUTS[DEEP]
    config = load_config(None, [f"model.path={found['folder']}", *KEYS, *keys])
    gain = recompute_gain(config, world, rank, found[LAYERS])["full"]
    none, full = (found[name] for name in (DEEP, f"{DEEP} full"))
    peaks = [one["peaks"]["gradients"]["bytes"] for one in (none, full)]
    assert gain["saved"] == pytest.approx(peaks[0] - peaks[1], rel=0.05)
    assert gain["flops"] == full["flops"]["gradients"] - none["flops"]["gradients"] > 0


def test_the_host_waits_as_it_is_listed(found: dict[str, dict[str, Any]]) -> None:
    reached = set()
    for name, rank in ((name, found[name]) for name in LAYOUTS):
        batches, packs = rank["minibatches"], rank["minibatches"] * rank["packs"]
        keys = " ".join(LAYOUTS[name][-1])
        old, full, critic, reference = batches > 1, "recompute=full" in keys, "=ppo" in keys, "kl_coef" in keys
        passes = (1 + old + full + reference) + critic * (2 + full)
        units = {
            "layer": rank["moe_layers"] * packs * passes,
            "pack": packs * (1 + critic),
            "pass": batches + old,
            "old": int(old),
            "values": int(critic),
            "lags": int("max_lag" in keys),
            "update": batches * (1 + critic),
            "batch": 1,
            "hosted": sum(n for at, *_, to, n in rank["copies"] if at in STEP and "param_copy_back_gpu" in to),
        }
        waits: Counter[str] = Counter()
        for phase, what, _, place, count in rank["waits"]:
            waits[f"{what} {place}"] += count * (phase in STEP)
        for wait, count in waits.items():
            allowed = sum(each * units[unit] for unit, each in WAITS.get(wait, {}).items())
            assert count <= allowed, f"{name}: {count} times {wait!r}, {allowed} are listed"
            if count == allowed:
                reached.add(wait)
    gone = WAITS.keys() - reached
    assert not gone, f"gone, or rarer than it is listed: {sorted(gone)}; shorten the list"


@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives_send_what_is_computed(found: dict[str, dict[str, Any]], name: str) -> None:
    rank = found[name]
    sent: dict[str, Sent] = {phase: Counter() for phase in POLICY}
    for phase, group, ranks, what, place, _, size in rank["sent"]:
        kind = next(kind for kind in KINDS if what.startswith(kind))
        alone = len(ranks) == 1 and kind not in ("send", "recv")
        if phase not in sent or alone:
            continue
        if group == BALANCE:
            assert "latent" in name and size <= FLOAT * EXPERTS * rank["minibatches"]  # of its one layer with experts
        elif "get_grad_norm" in place:
            assert size <= NORM * rank["minibatches"]
        else:
            sent[phase][GROUPS[group], kind] += size
    traffic, updates = stage_traffic(*trained(name)), rank["minibatches"]
    packs = updates * rank["packs"]
    passes = (updates > 1) + ("objective.kl_coef=0.1" in LAYOUTS[name][-1])
    assert sent["pi_old pass"] == times(passes * packs, traffic.forward)
    once = times(packs, traffic.forward) + times(packs, traffic.backward)
    assert sent["gradients"] == once + times(updates, traffic.reduced)
    assert sent["optimizer step"] == times(updates, traffic.gathered)


def times(count: int, sent: Sent) -> Sent:
    return +Counter({key: count * size for key, size in sent.items()})
