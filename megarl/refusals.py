"""What cannot be right, found before any process starts. One table of small functions; each refusal says the thing, its value and the fix.

A refusal looks at a `Case` and returns its sentence, or None. The order of the table matters: a later row may rely on what an earlier one
refused. Sizes come from config.json through the family's own `transformer_config`, under Megatron's names.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megarl.config import Config, ParallelConfig
from megarl.errors import UserError


@dataclass(frozen=True)
class Case:
    """A command with its configuration. `world` is the number of trainer ranks; `hf` the parsed config.json of model.path."""

    command: str
    config: Config
    world: int
    given_hf: dict[str, Any] | None = None

    @cached_property
    def hf(self) -> dict[str, Any]:
        if self.given_hf is not None:
            return self.given_hf
        return json.loads((Path(self.config.model.path) / "config.json").read_text())

    @cached_property
    def family(self) -> Any:
        from megarl.weights.weight_map import FAMILIES

        return importlib.import_module(FAMILIES[self.hf["model_type"]])

    @cached_property
    def model(self) -> dict[str, Any]:
        """Megatron's names: num_layers, num_attention_heads, num_query_groups, num_moe_experts, ..."""
        return self.family.transformer_config(self.hf)

    @property
    def dp(self) -> int:
        at = self.config.parallel
        return self.world // (at.tp * at.pp * at.cp)


def check(config: Config, command: str = "run", *, world_size: int | None = None, model_config: dict[str, Any] | None = None) -> None:
    """Raises UserError with the first refusal that holds for `command` (a command of the CLI, see cli.py).

    world_size: trainer ranks; None takes launch.trainers. model_config: config.json, already read; None reads it from model.path.
    """
    case = Case(command, config, config.launch.trainers if world_size is None else world_size, model_config)
    for refusal, commands in REFUSALS:
        if command in commands and (sentence := refusal(case)):
            raise UserError(sentence)


def _model_path(case: Case) -> str | None:
    path = case.config.model.path
    if not path:
        return "model.path is empty; give a Hugging Face checkpoint folder, e.g. model.path=runs/tiny"
    if not (Path(path) / "config.json").is_file():
        return f"model.path {path!r} has no config.json; give a Hugging Face checkpoint folder"
    try:
        _ = case.hf
    except ValueError as error:
        return f"model.path {path!r}: config.json is not JSON ({error}); copy the checkpoint again"
    return None


def _model_weights(case: Case) -> str | None:
    folder = Path(case.config.model.path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted({name for name in json.loads(index.read_text())["weight_map"].values() if not (folder / name).is_file()})
        return f"model.path {str(folder)!r} lacks {missing[0]}, which its index names; copy the checkpoint again" if missing else None
    if not any(folder.glob("*.safetensors")):
        return f"model.path {str(folder)!r} has no *.safetensors; save the checkpoint with safe_serialization"
    return None


def _tokenizer(case: Case) -> str | None:
    folder = Path(case.config.model.path)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    return f"model.path {str(folder)!r} has no tokenizer.json; save the tokenizer beside the weights"


def _family(case: Case) -> str | None:
    from megarl.weights.weight_map import FAMILIES

    kind = case.hf.get("model_type", "?")
    if kind not in FAMILIES:
        return f"model.path: model_type {kind!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
    return None


def _tied_embeddings(case: Case) -> str | None:
    if case.hf.get("tie_word_embeddings"):
        return "model.path: tie_word_embeddings true is not supported; use a checkpoint that has its own lm_head.weight"
    return None


def _rope_scaling(case: Case) -> str | None:
    scaling = case.hf.get("rope_scaling") or case.hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        return f"model.path: rope scaling {kind!r} is not supported; remove it from config.json to train within the original context"
    return None


def _sliding_window(case: Case) -> str | None:
    if case.hf.get("use_sliding_window"):
        return "model.path: use_sliding_window true is not supported; set it to false in config.json"
    return None


def _file(key: str, path: str | None, what: str) -> str | None:
    if not path:
        return f"{key} is empty; give {what}, one JSON object a line"
    if not Path(path).is_file():
        return f"{key} {path!r} does not exist; give {what}, one JSON object a line"
    if Path(path).stat().st_size == 0:
        return f"{key} {path!r} is an empty file; give {what}, one JSON object a line"
    return None


def _prompts(case: Case) -> str | None:
    path = case.config.data.prompts
    return _file("data.prompts", path, "a file of prompts") or _lines(case, path, "prompts")


def _eval_prompts(case: Case) -> str | None:
    path = case.config.eval.prompts
    if path is None:
        return None
    return _file("eval.prompts", path, "a file of prompts, or leave it unset") or _lines(case, path, "prompts")


def _demonstrations(case: Case) -> str | None:
    path = case.config.sft.data
    return _file("sft.data", path, "a file of demonstrations") or _lines(case, path, "demonstrations")


def _lines(case: Case, path: str, kind: Literal["prompts", "demonstrations"]) -> None:
    from megarl.data.prompts import check_lines

    if case.config.data.on_bad_line == "error":
        check_lines(path, kind)  # raises UserError, naming the line


def _reward(case: Case) -> str | None:
    from megarl.reward import get_reward

    get_reward(case.config.data.reward)  # raises UserError, naming the reward
    return None


def _run_dir(case: Case) -> str | None:
    path = Path(case.config.run.dir)
    if not case.config.run.dir:
        return "run.dir is empty; give a folder, e.g. run.dir=runs/first"
    there = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not there.is_dir():
        return f"run.dir {str(path)!r}: {str(there)!r} is a file; give a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"run.dir {str(path)!r} cannot be written; change its permissions or give another folder"
    return None


def _store(case: Case) -> str | None:
    store = case.config.launch.store
    host, colon, port = store.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        return f"launch.store {store!r} is not host:port; e.g. launch.store=127.0.0.1:29600"
    if port == "0":
        if case.command in ("train", "rollout"):
            return f"launch.store {store!r}: port 0 is for megarl run, which starts both sides; give both the same port, e.g. {host}:29600"
        return None
    if case.command == "rollout" or int(os.environ.get("RANK", "0")) != 0:
        return None  # joins a store that another process owns
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"launch.store {store!r}: the port is in use; give another, or port 0 to let megarl run pick one"
        return f"launch.store {store!r}: cannot listen there ({os.strerror(error.errno or 0)}); give an address of this host"
    return None


def _divides(size: int, key: str, count: int, what: str) -> str | None:
    if count % size:
        fits = [n for n in range(1, count + 1) if count % n == 0]
        return f"{key} {size} does not divide the model's {what}, {count}; use one of {', '.join(map(str, fits[:8]))}"
    return None


def _world(case: Case) -> str | None:
    at = case.config.parallel
    size = at.tp * at.pp * at.cp
    if case.world % size:
        return (
            f"parallel tp {at.tp} x pp {at.pp} x cp {at.cp} needs a multiple of {size} trainer ranks, there are {case.world}; "
            f"set launch.trainers={-(-case.world // size) * size} or change the layout"
        )
    return None


def _expert_world(case: Case) -> str | None:
    at = case.config.parallel
    size = at.etp * at.ep * at.pp
    if case.world % size:
        return (
            f"parallel etp {at.etp} x ep {at.ep} x pp {at.pp} needs a multiple of {size} trainer ranks, there are {case.world}; "
            f"set launch.trainers={-(-case.world // size) * size} or lower parallel.ep"
        )
    return None


def _heads(case: Case) -> str | None:
    tp = case.config.parallel.tp
    return _divides(tp, "parallel.tp", case.model["num_attention_heads"], "attention heads") or _divides(
        tp, "parallel.tp", case.model["num_query_groups"], "key/value heads"
    )


def _ffn(case: Case) -> str | None:
    dense = len(case.family.moe_layers(case.hf)) < case.model["num_layers"]
    return _divides(case.config.parallel.tp, "parallel.tp", case.model["ffn_hidden_size"], "intermediate_size") if dense else None


def _layers(case: Case) -> str | None:
    at = case.config.parallel
    if at.vpp > 1 and at.pp == 1:
        return f"parallel.vpp {at.vpp} needs more than one pipeline stage; set parallel.pp or parallel.vpp=1"
    layers = case.model["num_layers"]
    uneven = at.first_stage_layers is not None or at.last_stage_layers is not None
    if uneven:
        return _uneven_layers(at, layers)
    if layers % (at.pp * at.vpp):
        return f"parallel pp {at.pp} x vpp {at.vpp} does not divide the model's {layers} layers; use a product that divides {layers}"
    return None


def _uneven_layers(at: ParallelConfig, layers: int) -> str | None:
    given = f"parallel first_stage_layers {at.first_stage_layers}, last_stage_layers {at.last_stage_layers}"
    if at.vpp > 1 or at.pp == 1:
        return f"{given} need pp > 1 and vpp 1, not pp {at.pp}, vpp {at.vpp}; leave them unset or change parallel"
    from megarl.weights.layout import Layout

    sizes = Layout(**at.model_dump(), world=at.tp * at.pp * at.cp).stage_sizes(layers)
    if min(sizes) < 1 or sum(sizes) != layers:
        return f"{given} leave stages of {sizes} layers, not {layers} in all; change one of them"
    return None


def _experts(case: Case) -> str | None:
    at = case.config.parallel
    count = case.model.get("num_moe_experts")
    if not count:
        if at.ep > 1 or at.etp > 1:
            return f"parallel ep {at.ep}, etp {at.etp}: the model has no experts; set both to 1"
        return None
    if count > MOST_EXPERTS:
        return f"model.path: {count} experts are more than routes can name ({MOST_EXPERTS}); megarl keeps them as int16"
    return _divides(at.ep, "parallel.ep", count, "experts") or _divides(
        at.etp, "parallel.etp", case.model["moe_ffn_hidden_size"], "moe_intermediate_size"
    )


def _minibatches(case: Case) -> str | None:
    batch = case.config.batch
    if batch.prompts % batch.minibatches:
        return f"batch.prompts {batch.prompts} is not a multiple of batch.minibatches {batch.minibatches}; a mini-batch is whole groups"
    responses = batch.prompts // batch.minibatches * batch.group
    if responses < case.dp:
        return (
            f"batch: a mini-batch of {responses} responses (prompts / minibatches x group) cannot feed {case.dp} data-parallel ranks; "
            "raise batch.prompts or batch.group"
        )
    return None


def _group(case: Case) -> str | None:
    advantage = case.config.objective.advantage
    if case.config.batch.group == 1 and advantage in ("mean", "mean_std"):
        return f"batch.group 1 with objective.advantage {advantage!r} gives every response the advantage 0; set batch.group=2 or more"
    return None


def _sft_batch(case: Case) -> str | None:
    if case.config.sft.batch < case.dp:
        return f"sft.batch {case.config.sft.batch} cannot feed {case.dp} data-parallel ranks; raise sft.batch"
    return None


def _replay(case: Case) -> str | None:
    mode = case.config.replay_mode
    if mode != "none" and not case.model.get("num_moe_experts"):
        return f"replay.mode {mode} needs a MoE model, this one is dense; set replay.mode=none"
    return _unreplayable(case.model) if mode != "none" else None


def _unreplayable(model: dict[str, Any]) -> str | None:
    """Routers whose choice cannot be replayed (spec/routing.md, trap 3). `model`: Megatron's TransformerConfig keywords."""
    faults = (
        (model.get("moe_router_fusion"), "a fused router returns before the replay hook", "moe_router_fusion=False"),
        (model.get("moe_router_load_balancing_type") == "sinkhorn", "sinkhorn does not route by top-k", "load balancing 'none'"),
        (model.get("moe_expert_capacity_factor") is not None, "capacity dropping changes a replayed choice", "no capacity factor"),
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


def _objective(case: Case) -> str | None:
    objective = case.config.objective
    if objective.advantage == "gae":
        return f"objective {objective.preset!r} with advantage 'gae' needs a critic, which is not supported yet; use objective=minirl"
    if objective.kl_coef > 0:
        return f"objective.kl_coef {objective.kl_coef} needs a reference model, which is not supported yet; set it to 0"
    return None


def _lag(case: Case) -> str | None:
    lag = case.config.rollout.max_lag
    return f"rollout.max_lag {lag}: asynchronous rollouts are not supported yet; set rollout.max_lag=0" if lag else None


def _lengths(case: Case) -> str | None:
    rollout = case.config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    limit = case.hf.get("max_position_embeddings")
    if limit and longest > limit:
        return (
            f"rollout max_prompt_tokens {rollout.max_prompt_tokens} + max_new_tokens {rollout.max_new_tokens} = {longest} is above "
            f"the model's max_position_embeddings {limit}; lower one of them"
        )
    return None


def _micro_batch(case: Case) -> str | None:
    rollout, budget = case.config.rollout, case.config.engine.micro_batch_tokens
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if longest > budget:
        return f"engine.micro_batch_tokens {budget} cannot hold the longest prompt and response, {longest} tokens; raise it to {longest}"
    return None


def _rollout_tp(case: Case) -> str | None:
    tp, heads, groups = case.config.rollout.tp, case.model["num_attention_heads"], case.model["num_query_groups"]
    if refused := _divides(tp, "rollout.tp", heads, "attention heads"):
        return refused
    if groups % tp and tp % groups:
        return f"rollout.tp {tp} and the model's {groups} key/value heads do not divide each other; change rollout.tp"
    return None


MOST_EXPERTS = 2**15
LOOP = ("run", "train")
ENGINE = (*LOOP, "sft", "score", "compare")
ROLLOUT = (*LOOP, "rollout", "generate", "compare")
ALL = (*ENGINE, "rollout", "generate")

REFUSALS: tuple[tuple[Callable[[Case], str | None], tuple[str, ...]], ...] = (
    (_model_path, ALL),
    (_model_weights, ALL),
    (_tokenizer, ("run", "train", "sft", "rollout", "generate", "compare")),
    (_family, ALL),
    (_tied_embeddings, ALL),
    (_rope_scaling, ALL),
    (_sliding_window, ALL),
    (_prompts, (*LOOP, "compare")),
    (_eval_prompts, LOOP),
    (_demonstrations, ("sft",)),
    (_reward, (*LOOP, "compare")),
    (_run_dir, ALL),
    (_world, ENGINE),
    (_expert_world, ENGINE),
    (_heads, ENGINE),
    (_ffn, ENGINE),
    (_layers, ENGINE),
    (_experts, ENGINE),
    (_objective, (*LOOP, "compare")),
    (_minibatches, LOOP),
    (_group, LOOP),
    (_sft_batch, ("sft",)),
    (_replay, (*LOOP, "score", "compare")),
    (_lag, ROLLOUT),
    (_lengths, ROLLOUT),
    (_micro_batch, (*LOOP, "compare")),
    (_rollout_tp, ROLLOUT),
    (_store, ROLLOUT),
)
