"""Refusals of layouts: sizes that do not divide the ranks or the model."""

from __future__ import annotations

import math

from megarl.config import ParallelConfig
from megarl.refusals.case import Case

MOST_EXPERTS = 2**15


def _divides(size: int, key: str, count: int, what: str) -> str | None:
    if count % size:
        fits = [n for n in range(1, count + 1) if count % n == 0]
        return f"{key} {size} does not divide the model's {what}, {count}; use one of {', '.join(map(str, fits[:8]))}"
    return None


def world(case: Case) -> str | None:
    return _fills(case, ("tp", "pp", "cp"), "change the layout")


def expert_world(case: Case) -> str | None:
    return _fills(case, ("etp", "ep", "pp"), "lower parallel.ep")


def _fills(case: Case, keys: tuple[str, ...], other: str) -> str | None:
    """The ranks must be a multiple of the product of these sizes."""
    sizes = {key: getattr(case.config.parallel, key) for key in keys}
    size = math.prod(sizes.values())
    if case.world % size:
        return (
            f"parallel {' x '.join(f'{key} {n}' for key, n in sizes.items())} needs a multiple of {size} trainer "
            f"ranks, there are {case.world}; set launch.trainers={-(-case.world // size) * size} or {other}"
        )
    return None


def heads(case: Case) -> str | None:
    tp = case.config.parallel.tp
    return _divides(tp, "parallel.tp", case.model["num_attention_heads"], "attention heads") or _divides(
        tp, "parallel.tp", case.model["num_query_groups"], "key/value heads"
    )


def ffn(case: Case) -> str | None:
    tp, shared = case.config.parallel.tp, case.model.get("moe_shared_expert_intermediate_size")
    if shared and (refused := _divides(tp, "parallel.tp", shared, "shared expert's intermediate size")):
        return refused
    dense = 0 in case.model.get("moe_layer_freq", [0])
    return _divides(tp, "parallel.tp", case.model["ffn_hidden_size"], "intermediate_size") if dense else None


def layers(case: Case) -> str | None:
    parallel = case.config.parallel
    if parallel.vpp > 1 and parallel.pp == 1:
        return f"parallel.vpp {parallel.vpp} needs more than one pipeline stage; set parallel.pp or parallel.vpp=1"
    layers = case.model["num_layers"]
    uneven = parallel.first_stage_layers is not None or parallel.last_stage_layers is not None
    if uneven:
        return _uneven_layers(parallel, layers)
    if layers % (parallel.pp * parallel.vpp):
        return (
            f"parallel pp {parallel.pp} x vpp {parallel.vpp} does not divide the model's {layers} layers; use a "
            f"product that divides {layers}"
        )
    return None


def _uneven_layers(parallel: ParallelConfig, layers: int) -> str | None:
    given = f"parallel first_stage_layers {parallel.first_stage_layers}, last_stage_layers {parallel.last_stage_layers}"
    if parallel.vpp > 1 or parallel.pp == 1:
        here = f"pp {parallel.pp}, vpp {parallel.vpp}"
        return f"{given} need pp > 1 and vpp 1, not {here}; leave them unset or change parallel"
    from megarl.weights.map.layout import Layout

    sizes = Layout(**parallel.model_dump(), world=parallel.tp * parallel.pp * parallel.cp).stage_sizes(layers)
    if min(sizes) < 1 or sum(sizes) != layers:
        return f"{given} leave stages of {sizes} layers, not {layers} in all; change one of them"
    return None


def experts(case: Case) -> str | None:
    parallel = case.config.parallel
    count = case.model.get("num_moe_experts")
    if not count:
        if parallel.ep > 1 or parallel.etp > 1:
            return f"parallel ep {parallel.ep}, etp {parallel.etp}: the model has no experts; set both to 1"
        return None
    if count > MOST_EXPERTS:
        return f"model.path: {count} experts are more than routes can name ({MOST_EXPERTS}); megarl keeps them as int16"
    if parallel.etp > parallel.tp:  # megatron-core would add up gradients of ranks that hold other shards
        return f"parallel.etp {parallel.etp} is more than parallel.tp {parallel.tp}; lower etp or raise tp"
    return _divides(parallel.ep, "parallel.ep", count, "experts") or _divides(
        parallel.etp, "parallel.etp", case.model["moe_ffn_hidden_size"], "moe_intermediate_size"
    )


def rollout_tp(case: Case) -> str | None:
    tp, heads, groups = case.config.rollout.tp, case.model["num_attention_heads"], case.model["num_query_groups"]
    if refused := _divides(tp, "rollout.tp", heads, "attention heads"):
        return refused
    if groups % tp and tp % groups:
        return f"rollout.tp {tp} and the model's {groups} key/value heads do not divide each other; change rollout.tp"
    return None
