"""Refusals of the work itself: batches, lengths, objective and replay."""

from __future__ import annotations

import os
from typing import Any

from megarl.launch.gpus import has_gpu
from megarl.launch.processes import WITH_ROLLOUTS, WITHOUT_ENGINE
from megarl.objective.choices import CHOICES
from megarl.refusals.case import Case
from megarl.reward import FAST
from megarl.rollout.patience import ANSWER_S, STALE_S

LOWEST_TEMPERATURE = 0.01  # vllm.sampling_params._MAX_TEMP
MOST_A_CORE = 16  # processes


def processes(case: Case) -> str | None:
    """Those that would start here, all at once. GPUs have a bound of their own (launch/processes.py)."""
    if "RANK" in os.environ:
        return None  # an outer torchrun has started them
    config, cores = case.config, len(os.sched_getaffinity(0))
    counts = {} if has_gpu() or case.command in WITHOUT_ENGINE else {"launch.trainers": config.launch.trainers}
    if case.command in WITH_ROLLOUTS and not has_gpu():
        counts["rollout engines x tp"] = config.rollout.engines * config.rollout.tp
    if case.command not in ("sft", "score") and config.data.reward not in FAST:
        replicas = 1 if case.command in WITHOUT_ENGINE else max(case.dp, 1)
        counts["data.reward_workers x replicas"] = config.data.reward_workers * replicas
    most = MOST_A_CORE * cores
    if sum(counts.values()) > most:
        return (
            f"{' + '.join(f'{key} {count}' for key, count in counts.items())} are more processes than this host's "
            f"{cores} cores take; start at most {most}"
        )
    return None


def objective(case: Case) -> str | None:
    config = case.config.objective
    warmup, steps = case.config.critic.warmup_steps, case.config.train.steps
    if config.advantage == "gae" and warmup >= steps:
        return f"critic.warmup_steps {warmup} leaves none of train.steps {steps} for the policy; lower it"
    if any(getattr(config, part) not in names for part, names in CHOICES.items()):
        from megarl.objective.outside import try_outside  # imports torch

        try_outside(config)
    return None


def schedule(case: Case) -> str | None:
    """What megatron-core's OptimizerParamScheduler asserts without a word."""
    train = case.config.train
    if train.lr_decay_style != "constant" and train.min_lr > train.lr:
        return f"train.min_lr {train.min_lr:g} is above train.lr {train.lr:g}, where the decay starts; lower it"
    warmup, decay = train.lr_warmup_iters, train.lr_decay_iters
    if decay is not None and warmup >= decay:
        return (
            f"train.lr_warmup_iters {warmup} is not below train.lr_decay_iters {decay}, which counts from the same "
            "first step; lower the former or raise the latter"
        )
    return None


def minibatches(case: Case) -> str | None:
    batch = case.config.batch
    if batch.prompts % batch.minibatches:
        return (
            f"batch.prompts {batch.prompts} is not a multiple of batch.minibatches {batch.minibatches}; a mini-batch "
            "is whole groups"
        )
    return None


def fed(case: Case) -> str | None:
    batch = case.config.batch
    responses = batch.prompts // batch.minibatches * batch.group
    if responses < case.dp:
        return (
            f"batch: a mini-batch of {responses} responses (prompts / minibatches x group) cannot feed {case.dp} "
            "data-parallel ranks; "
            "raise batch.prompts or batch.group"
        )
    return None


def optimizer_offload(case: Case) -> str | None:
    engine = case.config.engine
    if not engine.optimizer_offload_fraction:
        return None
    key = f"engine.optimizer_offload_fraction {engine.optimizer_offload_fraction:g}"
    if not engine.distributed_optimizer:
        return (
            f"{key} without engine.distributed_optimizer: every replica would step the same parameters on its CPU; set "
            "engine.distributed_optimizer=true"
        )
    if engine.dtype == "float32" or (engine.dtype == "auto" and case.command != "plan" and not has_gpu()):
        return (
            f"{key} with engine.dtype {engine.dtype}: a float32 parameter is its own master weight, which "
            "megatron-core does not put in host memory; set engine.dtype=bfloat16, or the fraction to 0"
        )
    return None


def group(case: Case) -> str | None:
    advantage = case.config.objective.advantage
    if case.config.batch.group == 1 and advantage not in ("reward", "gae"):
        return (
            f"batch.group 1 with objective.advantage {advantage!r} gives every response the advantage 0; set "
            "batch.group=2 or more"
        )
    return None


def sft_batch(case: Case) -> str | None:
    if case.config.sft.batch < case.dp:
        return f"sft.batch {case.config.sft.batch} cannot feed {case.dp} data-parallel ranks; raise sft.batch"
    return None


def replay(case: Case) -> str | None:
    mode = case.config.replay_mode
    if not case.model.get("num_moe_experts"):
        if case.config.replay.mode in (None, "none"):  # its default is then none
            return None
        return f"replay.mode {mode} needs a MoE model, this one is dense; set replay.mode=none"
    return unreplayable(case.model) if mode != "none" else None


def unreplayable(model: dict[str, Any]) -> str | None:
    """Routers whose choice cannot be replayed (docs/routing.md, trap
    3). `model`: Megatron's TransformerConfig keywords.
    """
    faults = (
        (model.get("moe_router_fusion"), "a fused router returns before the replay hook", "moe_router_fusion=False"),
        (
            model.get("moe_router_load_balancing_type") == "sinkhorn",
            "sinkhorn does not route by top-k",
            "load balancing 'none'",
        ),
        (
            model.get("moe_expert_capacity_factor") is not None,
            "capacity dropping changes a replayed choice",
            "no capacity factor",
        ),
        (
            "moe_router" in str(model.get("cuda_graph_scope") or ""),
            "a graph-captured router replays nothing",
            "no 'moe_router' in the scope",
        ),
        (
            model.get("overlap_moe_expert_parallel_comm"),
            "combined 1F1B runs forwards out of order",
            "overlap_moe_expert_parallel_comm=False",
        ),
    )
    for wrong, why, fix in faults:
        if wrong:
            return f"replay.mode: {why}; use {fix} or replay.mode=none"
    return None


def quantize(case: Case) -> str | None:
    """In the file it may serve a run, whose rollouts are then other than these."""
    how = case.config.sync.quantize
    if how == "none":
        return None
    return (
        f"sync.quantize {how}: megarl {case.command} serves the weights of model.path as they are, nothing is sent to "
        "its servers; set sync.quantize=none, or use megarl compare"
    )


def lag(case: Case) -> str | None:
    config = case.config
    lag, minibatches = config.rollout.max_lag, config.batch.minibatches
    if not lag:
        return None
    if lag < minibatches:
        return (
            f"rollout.max_lag {lag} has no room for one batch, which is {minibatches} optimizer steps "
            f"(batch.minibatches); set rollout.max_lag={minibatches}, or 0 for lock-step"
        )
    if config.launch.colocate:
        return (
            f"rollout.max_lag {lag} with launch.colocate: rollouts cannot overlap training where both take turns with "
            "the GPUs; set rollout.max_lag=0 or launch.colocate=false"
        )
    return None


def stall(case: Case) -> str | None:
    seconds, missed = case.config.launch.stall_s, STALE_S + ANSWER_S
    if 0 < seconds <= missed:
        return (
            f"launch.stall_s {seconds:g} is no more than the {missed:g} s after which a silent server is missed: "
            "who waits for one would count as stalled; raise it, or set it to 0 for never"
        )
    return None


def lengths(case: Case) -> str | None:
    rollout = case.config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    limit = case.hf.get("max_position_embeddings")
    if limit and longest > limit:
        return (
            f"rollout max_prompt_tokens {rollout.max_prompt_tokens} + max_new_tokens {rollout.max_new_tokens} = "
            f"{longest} is above "
            f"the model's max_position_embeddings {limit}; lower one of them"
        )
    if limit and case.config.server_context > limit:
        return (
            f"model.path: max_position_embeddings {limit} is below the {case.config.server_context} tokens of a weight "
            "sync's check; use another model"
        )
    return None


def overlong(case: Case) -> str | None:
    buffer, longest = case.config.data.overlong_buffer, case.config.rollout.max_new_tokens
    if buffer > longest:
        return (
            f"data.overlong_buffer {buffer} is above rollout.max_new_tokens {longest}: even an empty response would be "
            "penalised; lower it"
        )
    return None


def temperature(case: Case) -> str | None:
    value = case.config.rollout.temperature
    if value < LOWEST_TEMPERATURE:
        return (
            f"rollout.temperature {value:g} is below {LOWEST_TEMPERATURE:g}, to which vLLM raises it while the trainer "
            f"does not; set it to {LOWEST_TEMPERATURE:g} or more"
        )
    return None


def evaluation(case: Case) -> str | None:
    settings = case.config.eval
    if settings.prompts is None:
        return None
    if 0 < settings.temperature < LOWEST_TEMPERATURE:
        return (
            f"eval.temperature {settings.temperature:g} is below {LOWEST_TEMPERATURE:g}, to which vLLM raises it; set "
            "it to 0 for greedy sampling, or higher"
        )
    if settings.temperature == 0 and settings.samples > 1:
        return (
            f"eval.samples {settings.samples} with eval.temperature 0: greedy sampling gives the same response each "
            "time; set eval.samples=1 or a temperature"
        )
    return None


def micro_batch(case: Case) -> str | None:
    rollout, budget = case.config.rollout, case.config.engine.micro_batch_tokens
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if longest > budget:
        return (
            f"engine.micro_batch_tokens {budget} cannot hold the longest prompt and response, {longest} tokens; raise "
            f"it to {longest}"
        )
    return None
