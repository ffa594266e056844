"""Every refusal: a configuration with that one fault gives that one
line, and the table holds no refusal without a case here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl import refusals
from megarl.config import load_config
from megarl.errors import UserError
from tests.conftest import write_weights

# refusal, command, overrides, changes of config.json, what the line must say (thing, value, fix)
CASES: list[tuple[str, str, list[str], dict[str, Any], list[str]]] = [
    ("model_path", "run", ["model.path="], {}, ["model.path is empty", "give"]),
    (
        "model_path",
        "rollout",
        ["model.path=Qwen/Qwen3-30B-A3B"],
        {},
        ["model.path 'Qwen/Qwen3-30B-A3B' does not exist; nothing is fetched from a hub", "a local folder"],
    ),
    ("model_path", "run", ["model.path=/tmp"], {}, ["model.path '/tmp' has no config.json", "give"]),
    ("family", "run", [], {"model_type": "gpt2"}, ["model_type 'gpt2' is not supported", "qwen3_moe"]),
    ("architecture", "sft", [], {"mlp_bias": True}, ["mlp_bias true", "without biases"]),
    ("architecture", "run", [], {"rope_scaling": {"rope_type": "yarn"}}, ["rope scaling 'yarn'", "remove"]),
    (
        "architecture",
        "run",
        [],
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        ["rope scaling 'linear'"],
    ),
    ("architecture", "run", [], {"use_sliding_window": True}, ["use_sliding_window true", "false"]),
    (
        "block_fp8",
        "rollout",
        [],
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        ["is quantised", "convert it first", "hf_to_megatron.py", "then model.path=DIR"],
    ),
    ("prompts", "run", ["data.prompts="], {}, ["data.prompts is empty", "give"]),
    ("prompts", "train", ["data.prompts=/nowhere.jsonl"], {}, ["data.prompts '/nowhere.jsonl' does not exist", "give"]),
    ("prompts", "run", ["data.prompts=/dev/null"], {}, ["data.prompts '/dev/null'", "give"]),
    (
        "eval_prompts",
        "run",
        ["eval.prompts=/nowhere.jsonl"],
        {},
        ["eval.prompts '/nowhere.jsonl' does not exist", "unset"],
    ),
    ("demonstrations", "sft", ["sft.data=/nowhere.jsonl"], {}, ["sft.data '/nowhere.jsonl' does not exist", "give"]),
    ("reward", "run", ["data.reward=digit_sums"], {}, ["digit_sums", "digit_sum"]),
    ("reward", "run", ["data.reward=no.such.function"], {}, ["no.such"]),
    (
        "loggers",
        "run",
        ["run.loggers=[collections.OrderedDict]"],
        {},
        ["run.loggers 'collections.OrderedDict' has no log and close", "run_dir, settings, resumed_step"],
    ),
    (
        "loggers",
        "sft",
        ["run.loggers=[tests.unit.test_loggers.Wrong]"],
        {},
        ["run.loggers 'tests.unit.test_loggers.Wrong'", "missing a required argument: 'url'"],
    ),
    ("stall", "run", ["launch.stall_s=25"], {}, ["launch.stall_s 25 is no more than the 25 s", "raise it"]),
    ("loggers", "run", ["run.loggers=[tensorbord]"], {}, ["run.loggers 'tensorbord' is unknown", "'tensorboard'"]),
    (
        "transformer_engine",
        "sft",
        ["engine.transformer_impl=transformer_engine"],
        {},
        ["not installed", "engine.transformer_impl=auto"],
    ),
    (
        "rollout_python",
        "run",
        ["launch.rollout_python=/nowhere"],
        {},
        ["launch.rollout_python '/nowhere' is no program", "give"],
    ),
    (
        "rollout_kernels",
        "run",
        ["rollout.quantization=fp8"],
        {},
        ["rollout.quantization fp8 needs a GPU", "rollout.quantization=none"],
    ),
    (
        "rollout_kernels",
        "run",
        ["rollout.batch_invariant=true"],
        {},
        ["rollout.batch_invariant true needs a GPU", "=false"],
    ),
    (
        "fp8_cache_on_a_cpu",
        "run",
        ["rollout.kv_cache_dtype=fp8"],
        {"head_dim": 80},
        ["kv_cache_dtype fp8", "a multiple of 32, these are 80"],
    ),
    (
        "heads_on_a_cpu",
        "run",
        [],
        {"head_dim": 16},
        ["head_dim 16 is none", "vLLM's attention on a CPU", "(32, 64, 80"],
    ),
    (
        "kv_cache",
        "run",
        ["rollout.kv_cache_gib=0.0001"],
        {},
        [
            "rollout.kv_cache_gib 0.0001 cannot hold one request of 128 tokens",
            "64 + max_new_tokens 64",
            "to 0.00031 or",
        ],
    ),
    ("weights", "score", [], {"vocab_size": 31}, ["(32, 64), config.json wants (31, 64) (vocab_size 31)", "use the"]),
    ("run_dir", "run", ["run.dir="], {}, ["run.dir is empty", "give"]),
    ("run_dir", "run", ["run.dir=/dev/null/x"], {}, ["'/dev/null' is a file", "give"]),
    (
        "world",
        "run",
        ["launch.trainers=6"],
        {},
        ["tp 2 x pp 2 x cp 1 needs a multiple of 4", "there are 6", "launch.trainers=8"],
    ),
    (
        "expert_world",
        "sft",
        ["parallel.tp=1", "launch.trainers=2"],
        {},
        ["ep 2 x pp 2 needs a multiple of 4", "there are 2"],
    ),
    (
        "heads",
        "run",
        ["parallel.tp=3", "launch.trainers=12"],
        {},
        ["parallel.tp 3", "attention heads, 4", "use one of 1, 2, 4"],
    ),
    (
        "heads",
        "run",
        ["parallel.tp=4", "launch.trainers=8"],
        {},
        ["parallel.tp 4", "key/value heads, 2", "use one of 1, 2"],
    ),
    (
        "ffn",
        "run",
        [],
        {"mlp_only_layers": [0], "intermediate_size": 33},
        ["parallel.tp 2", "intermediate_size, 33", "use one of"],
    ),
    (
        "layers",
        "run",
        ["parallel.pp=3", "parallel.ep=1", "launch.trainers=6"],
        {},
        ["pp 3 x vpp 1", "4 layers", "divides 4"],
    ),
    ("layers", "run", ["parallel.vpp=4"], {}, ["pp 2 x vpp 4", "4 layers"]),
    ("layers", "run", ["parallel.pp=1", "parallel.vpp=2"], {}, ["parallel.vpp 2 needs more than one pipeline stage"]),
    (
        "layers",
        "run",
        ["parallel.first_stage_layers=4"],
        {},
        ["first_stage_layers 4", "stages of [4, 0] layers", "change"],
    ),
    (
        "layers",
        "run",
        ["parallel.vpp=2", "parallel.first_stage_layers=1"],
        {},
        ["first_stage_layers 1", "vpp 2", "unset"],
    ),
    ("experts", "run", [], {"num_experts": 40_000}, ["40000 experts", "32768"]),
    (
        "experts",
        "run",
        ["parallel.ep=3", "parallel.tp=2", "launch.trainers=12"],
        {},
        ["parallel.ep 3", "experts, 8", "use one of 1, 2, 4, 8"],
    ),
    (
        "experts",
        "run",
        ["parallel.etp=2", "parallel.ep=1"],
        {"moe_intermediate_size": 33},
        ["parallel.etp 2", "moe_intermediate_size, 33"],
    ),
    (
        "replay",
        "run",
        ["parallel.ep=1", "replay.mode=R3"],
        {"num_experts": 0, "num_local_experts": 0},
        ["replay.mode R3 needs a MoE model", "none"],
    ),
    (
        "objective",
        "run",
        ["objective=ppo", "critic.warmup_steps=9", "train.steps=9"],
        {},
        ["critic.warmup_steps 9", "steps 9", "lower it"],
    ),
    (
        "schedule",
        "sft",
        ["train.lr=1e-5", "train.min_lr=1e-4", "train.lr_decay_style=cosine"],
        {},
        ["train.min_lr 0.0001 is above train.lr 1e-05", "lower it"],
    ),
    (
        "schedule",
        "run",
        ["train.lr_warmup_iters=10", "train.lr_decay_iters=10"],
        {},
        ["train.lr_warmup_iters 10 is not below train.lr_decay_iters 10", "raise"],
    ),
    ("minibatches", "run", ["batch.prompts=6"], {}, ["batch.prompts 6 is not a multiple of batch.minibatches 4"]),
    (
        "fed",
        "run",
        ["batch.prompts=1", "batch.minibatches=1", "batch.group=2", "parallel.tp=1", "parallel.pp=1"],
        {},
        ["mini-batch of 2 responses", "4 data-parallel ranks", "raise"],
    ),
    ("group", "run", ["batch.group=1"], {}, ["batch.group 1", "'mean'", "batch.group=2"]),
    (
        "sft_batch",
        "sft",
        ["sft.batch=1", "parallel.tp=1", "parallel.pp=1"],
        {},
        ["sft.batch 1 cannot feed 4", "raise sft.batch"],
    ),
    (
        "quantize",
        "generate",
        ["sync.quantize=int4"],
        {},
        ["sync.quantize int4", "megarl generate serves the weights", "set sync.quantize=none"],
    ),
    ("eval_prompts", "eval", ["eval.prompts=null"], {}, ["eval.prompts is unset", "give a file of prompts"]),
    (
        "lag",
        "run",
        ["rollout.max_lag=2", "batch.minibatches=4"],
        {},
        ["rollout.max_lag 2", "no room for one batch", "set rollout.max_lag=4"],
    ),
    (
        "lag",
        "run",
        ["rollout.max_lag=4", "launch.colocate=true"],
        {},
        ["rollout.max_lag 4 with launch.colocate", "set rollout.max_lag=0"],
    ),
    (
        "lengths",
        "run",
        ["rollout.max_new_tokens=2000"],
        {},
        ["max_new_tokens 2000 = 2064", "max_position_embeddings 2048", "lower"],
    ),
    ("overlong", "run", ["data.overlong_buffer=65"], {}, ["data.overlong_buffer 65", "max_new_tokens 64", "lower it"]),
    ("temperature", "run", ["rollout.temperature=0.009"], {}, ["rollout.temperature 0.009", "0.01 or more"]),
    ("temperature", "rollout", ["rollout.temperature=1e-5"], {}, ["rollout.temperature 1e-05", "0.01 or more"]),
    ("evaluation", "run", ["eval.temperature=0.005"], {}, ["eval.temperature 0.005", "set it to 0"]),
    ("evaluation", "train", ["eval.temperature=0", "eval.samples=2"], {}, ["eval.samples 2", "greedy", "samples=1"]),
    (
        "lengths",
        "run",
        ["rollout.max_new_tokens=4", "rollout.max_prompt_tokens=4"],
        {"max_position_embeddings": 32},
        ["max_position_embeddings 32 is below the 65 tokens of a weight sync's check"],
    ),
    ("micro_batch", "run", ["engine.micro_batch_tokens=100"], {}, ["engine.micro_batch_tokens 100", "raise it to 128"]),
    ("processes", "score", ["launch.trainers=1000000000"], {}, ["launch.trainers 1000000000 are more", "at most"]),
    ("processes", "run", ["rollout.engines=1000000000"], {}, ["launch.trainers 4 + rollout engines x tp 1000000000"]),
    ("processes", "generate", ["rollout.engines=1000000000"], {}, ["rollout engines x tp 1000000000 are more"]),
    (
        "processes",
        "train",
        ["data.reward=math_verify", "data.reward_workers=1000000000"],
        {},
        ["launch.trainers 4 + data.reward_workers x replicas 1000000000 are more processes"],
    ),
    ("rollout_tp", "rollout", ["rollout.tp=3", "launch.store=127.0.0.1:1"], {}, ["rollout.tp 3", "attention heads, 4"]),
    ("store", "run", ["launch.store=here"], {}, ["launch.store 'here' is not host:port", "e.g."]),
    ("store", "run", ["launch.store=[fe80::1]:29600"], {}, ["launch.store '[fe80::1]:29600' is an IPv6", "IPv4"]),
    ("store", "rollout", ["launch.store=fe80::1:29600"], {}, ["is an IPv6 address", "give a host's name"]),
    ("store", "run", ["launch.store=192.0.2.1:0"], {}, ["launch.store '192.0.2.1:0'", "address of this host"]),
    ("store", "run", ["launch.store=no.such.host.invalid:1"], {}, ["'no.such.host.invalid' is no host's name"]),
    ("store", "rollout", [], {}, ["launch.store '127.0.0.1:0': give the port", "`megarl train` prints it"]),
    (
        "store",
        "run",
        ["launch.store=192.0.2.1:29600"],
        {},
        ["launch.store '192.0.2.1:29600'", "cannot listen", "address of this host"],
    ),
]
APART = {
    "chat_template",
    "settings",
    "colocate",
    "compiler_on_a_cpu",
    "deepseek_router",
    "ends",
    "glm_head_dim",
    "loader",
    "megatron_checkpoint",
    "optimizer_offload",
    "prompts_to_answer",
    "run_dir_of_another",
    "served_weights",
    "sft_out",
    "tokenizer",
}  # tests of their own, below or in another file


@pytest.mark.parametrize(
    ("name", "command", "overrides", "hf", "says"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_refusal(
    run_yaml: Path,
    hf_config: dict[str, Any],
    name: str,
    command: str,
    overrides: list[str],
    hf: dict[str, Any],
    says: list[str],
) -> None:
    (run_yaml.parent / "model" / "config.json").write_text(json.dumps(hf_config | hf))
    config = load_config(run_yaml, overrides)
    with pytest.raises(UserError) as error:
        refusals.check(config, command)
    line = str(error.value)
    assert "\n" not in line
    for words in says:
        assert words in line, line
    if name not in ("reward", "loggers", "architecture", "weights"):  # which raise by themselves
        case = refusals.Case(command, config, config.launch.trainers)
        assert next(refusal for refusal, _ in refusals.REFUSALS if refusal.__name__ == name)(case) == line


def test_every_refusal_of_the_table_has_a_case() -> None:
    assert {refusal.__name__ for refusal, _ in refusals.REFUSALS} == {case[0] for case in CASES} | APART


@pytest.mark.parametrize("command", ["run", "sft", "score", "generate", "eval"])
def test_nothing_is_refused_where_nothing_is_wrong(run_yaml: Path, command: str) -> None:
    refusals.check(load_config(run_yaml), command)


def test_a_dense_model_has_replay_off_and_is_refused_expert_parallelism(
    run_yaml: Path, hf_config: dict[str, Any]
) -> None:
    dense = {**hf_config, "model_type": "qwen3"}
    (run_yaml.parent / "model" / "config.json").write_text(json.dumps(dense))
    write_weights(run_yaml.parent / "model", dense)
    refusals.check(load_config(run_yaml, ["parallel.ep=1"]))  # four mini-batches, which is R3 where there are experts
    with pytest.raises(UserError, match="replay.mode R3 needs a MoE model"):
        refusals.check(load_config(run_yaml, ["parallel.ep=1", "replay.mode=R3"]))
    with pytest.raises(UserError, match="ep 2, etp 1: the model has no experts"):
        refusals.check(load_config(run_yaml))


def test_experts_are_not_cut_over_more_ranks_than_the_rest(run_yaml: Path) -> None:
    """Their gradients would be summed over ranks with other shards."""
    with pytest.raises(UserError, match=r"parallel\.etp 2 is more than parallel\.tp 1; lower etp"):
        refusals.check(load_config(run_yaml, ["parallel.tp=1", "parallel.etp=2", "parallel.ep=1"]))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("moe_router_fusion", True, "fused router"),
        ("moe_router_load_balancing_type", "sinkhorn", "sinkhorn"),
        ("moe_expert_capacity_factor", 1.0, "capacity dropping"),
        ("cuda_graph_scope", ["moe_router"], "graph-captured router"),
        ("overlap_moe_expert_parallel_comm", True, "combined 1F1B"),
    ],
)
def test_trap_03_a_router_that_cannot_be_replayed_is_refused(key: str, value: Any, said: str) -> None:
    sentence = refusals.work.unreplayable({key: value})
    assert sentence is not None and said in sentence and "replay.mode=none" in sentence
    assert refusals.work.unreplayable({}) is None
