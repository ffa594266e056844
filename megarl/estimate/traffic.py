"""Bytes that a trainer rank gives to the collectives of a mini-batch, from config.json and the layout alone.

Held against what a simulated GPU sends (tests/unit/test_simulate.py). Left out: single numbers, such as the norm of the
gradients, and what the host sends. Routes are taken as even: every expert gets as many rows as the others.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from megarl.estimate.memory import Held, Training, layer_kinds, stage_held
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import Param, WeightMap

FLOAT = 4  # bytes: of gradients, of gates and of what is summed over ranks
TOTALS = 4 * FLOAT  # a row: what the ranks of a vocabulary tell one another for the log-probability of its token
START = 64  # elements: where a parameter begins in a buffer of the distributed optimizer
END = 128  # and what the buffer's end is a multiple of, besides the ranks
Sent = Counter[tuple[str, str]]  # (group, kind of collective) -> bytes


@dataclass(frozen=True)
class Traffic:
    """Of one rank. forward, backward: of one pack; the latter with what recompute repeats. reduced, gathered: once a
    mini-batch, gradients and parameters.
    """

    forward: Sent
    backward: Sent
    reduced: Sent
    gathered: Sent


def stage_traffic(weight_map: WeightMap, training: Training, stage: int, held: Held | None = None) -> Traffic:
    """Of a rank of this pipeline stage; all have the same. held: what it holds, where that is known already; without
    what the distributed optimizer's buffers are rounded up by.
    """
    layout = training.layout
    forward, backward = _messages(weight_map, training, stage)
    again = Sent()
    for chunk in range(layout.vpp):
        for moe, count in layer_kinds(weight_map, layout, stage, chunk).items():
            once = _layer_forward(weight_map, training, moe)
            forward += _times(count, once)
            backward += _times(count, _layer_backward(weight_map, training, moe))
            if training.recompute == "full":
                again += _times(count, once)
            elif training.recompute == "selective":
                again += _times(count, _keys_and_values(weight_map, training))
    ends_forward, ends_backward = _ends(weight_map, training, stage)
    elements = _buffers(weight_map, training, stage) if held is None else _unrounded(layout, held)
    return Traffic(
        forward + ends_forward,
        backward + again + ends_backward,
        _reduced(weight_map, training, stage, elements, held or stage_held(weight_map, layout, stage)),
        _gathered(training, elements),
    )


def _times(count: int, sent: Sent) -> Sent:
    return Sent({key: count * size for key, size in sent.items()})


def buffer_elements(params: list[Param], distributed: bool, ranks: int) -> int:
    """Of the gradient buffer of these parameters, as megatron-core lays it out (param_and_grad_buffer.py)."""
    end = 0
    for param in params:
        end = (_multiple(end, START) if distributed else end) + math.prod(param.shape)
    return _multiple(end, math.lcm(ranks, END)) if distributed else end


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def _rows(training: Training) -> tuple[int, int]:
    """(of a context-parallel rank, of its sequence-parallel slice)."""
    rows = training.tokens // training.layout.cp
    return rows, rows // training.layout.tp


def _layer_forward(weight_map: WeightMap, training: Training, moe: bool) -> Sent:
    sent = _keys_and_values(weight_map, training)
    parts = _dense_parts(weight_map, moe)
    row = weight_map.model["hidden_size"] * training.itemsize
    rows, own = _rows(training)
    if training.layout.tp > 1:
        sent["tensor", "allgather"] += own * (sum(_into_attention(weight_map, training)) + parts * row)
        sent["tensor", "reduce_scatter"] += (1 + parts) * rows * row
    return sent + _to_experts(weight_map, training, backward=False) if moe else sent


def _layer_backward(weight_map: WeightMap, training: Training, moe: bool) -> Sent:
    layout, sent = training.layout, Sent()
    parts, into = _dense_parts(weight_map, moe), _into_attention(weight_map, training)
    row = weight_map.model["hidden_size"] * training.itemsize
    rows, own = _rows(training)
    if layout.cp > 1:
        sent["context", "reduce_scatter"] += layout.cp * rows * _key_value_bytes(weight_map, training)
    if layout.tp > 1:
        # what went into products once more, and the gradients of results
        sent["tensor", "allgather"] += own * (into[0] + row + 2 * parts * row)
        sent["tensor", "reduce_scatter"] += rows * (sum(into) + parts * row)
    return sent + _to_experts(weight_map, training, backward=True) if moe else sent


def _into_attention(weight_map: WeightMap, training: Training) -> tuple[int, int]:
    """Bytes a row that attention gathers over tensor-parallel ranks: into its products, and as they are."""
    model, size = weight_map.model, training.itemsize
    if not model.get("multi_latent_attention"):
        return size * model["hidden_size"], 0
    into_queries = model.get("q_lora_rank") or model["hidden_size"]
    return size * (into_queries + model["kv_lora_rank"]), size * model["qk_pos_emb_head_dim"]


def _dense_parts(weight_map: WeightMap, moe: bool) -> int:
    """MLPs of a layer that are cut over tensor-parallel ranks: the layer's own, or the shared expert."""
    return int(not moe or bool(weight_map.model.get("moe_shared_expert_intermediate_size")))


def _key_value_bytes(weight_map: WeightMap, training: Training) -> int:
    """A row. Latent attention sends the keys and values of all heads."""
    model = weight_map.model
    if model.get("multi_latent_attention"):
        width = model["num_attention_heads"] * (
            model["qk_head_dim"] + model["qk_pos_emb_head_dim"] + model["v_head_dim"]
        )
    else:
        width = 2 * model["num_query_groups"] * model["kv_channels"]
    return width // training.layout.tp * training.itemsize


def _keys_and_values(weight_map: WeightMap, training: Training) -> Sent:
    if training.layout.cp == 1:
        return Sent()
    return Sent({("context", "allgather"): _rows(training)[0] * _key_value_bytes(weight_map, training)})


def _to_experts(weight_map: WeightMap, training: Training, *, backward: bool) -> Sent:
    """Rows to the experts and back; under ETP in float32 on their way back, since megatron-core adds them up so."""
    layout, model, sent = training.layout, weight_map.model, Sent()
    routed = _rows(training)[1] * weight_map.top_k
    row, wide = model["hidden_size"] * training.itemsize, model["hidden_size"] * FLOAT
    if layout.ep * layout.etp > 1 and not backward:
        sent["experts", "allgather"] += 8 * weight_map.num_experts  # how many rows each gets
    if layout.ep > 1:
        sent["expert", "alltoall"] += routed * (2 * row + FLOAT)
    if layout.etp > 1:
        sent["expert tensor", "allgather"] += routed * (wide if backward else row + FLOAT)
        sent["expert tensor", "reduce_scatter"] += layout.etp * routed * (row + FLOAT if backward else wide)
    return sent


def _ends(weight_map: WeightMap, training: Training, stage: int) -> tuple[Sent, Sent]:
    """(forward, backward) of the embedding and of the output layer."""
    layout = training.layout
    forward, backward = Sent(), Sent()
    row = weight_map.model["hidden_size"] * training.itemsize
    rows, own = _rows(training)
    if layout.tp > 1 and stage == 0:
        forward["tensor", "reduce_scatter"] += rows * row
        backward["tensor", "allgather"] += own * row
    if stage == layout.pp - 1:
        if layout.tp > 1:
            forward["tensor", "allgather"] += own * row
            forward["tensor", "allreduce"] += rows * TOTALS
            backward["tensor", "allgather"] += own * row
            backward["tensor", "reduce_scatter"] += rows * row
        if layout.cp > 1:
            forward["context", "allgather"] += rows * 2 * FLOAT  # log-probability and entropy
    return forward, backward


def _messages(weight_map: WeightMap, training: Training, stage: int) -> tuple[Sent, Sent]:
    """(forward, backward) between pipeline stages: what comes in is counted too."""
    layout = training.layout
    size = _rows(training)[1] * weight_map.model["hidden_size"] * training.itemsize
    forward, backward = Sent(), Sent()
    for chunk in range(layout.vpp):
        if (stage, chunk) != (0, 0):
            forward["pipeline", "recv"] += size
            backward["pipeline", "send"] += size
        if (stage, chunk) != (layout.pp - 1, layout.vpp - 1):
            forward["pipeline", "send"] += size
            backward["pipeline", "recv"] += size
    return forward, backward


def experts_apart(layout: Layout) -> bool:
    """Whether expert gradients are summed over other ranks than the rest (engine/model.py)."""
    return layout.ep > 1 or layout.tp > layout.etp


def _buffers(weight_map: WeightMap, training: Training, stage: int) -> dict[str, int]:
    """Elements of the gradient buffers, by the group that sums them; none where a rank is alone in it."""
    layout = training.layout
    coord = layout.coord(stage * (layout.world // layout.pp))
    params = [param for param in weight_map.params(layout, coord) if not param.buffer]
    elements = dict.fromkeys(_replicas(layout), 0)
    for chunk in range(layout.vpp):
        for group, ranks in _replicas(layout).items():
            expert = group == "expert data"
            held = [p for p in params if p.chunk == chunk and (p.expert and experts_apart(layout)) == expert]
            elements[group] += buffer_elements(held, training.distributed_optimizer, ranks) if ranks > 1 else 0
    return elements


def _unrounded(layout: Layout, held: Held) -> dict[str, int]:
    apart = held.expert if experts_apart(layout) else 0
    counts = {"data": held.dense + held.expert - apart, "expert data": apart}
    return {group: counts[group] if ranks > 1 else 0 for group, ranks in _replicas(layout).items()}


def _replicas(layout: Layout) -> dict[str, int]:
    """Ranks of the groups that sum gradients."""
    return {"data": layout.dp * layout.cp, "expert data": layout.edp}


def _reduced(weight_map: WeightMap, training: Training, stage: int, elements: dict[str, int], held: Held) -> Sent:
    layout = training.layout
    kind = "reduce_scatter" if training.distributed_optimizer else "allreduce"
    sent = Sent({(group, kind): FLOAT * count for group, count in elements.items()})
    if layout.tp > 1:  # each rank saw its slice of the rows
        sent["tensor", "allreduce"] += FLOAT * held.whole
    if weight_map.tied and layout.pp > 1 and stage in (0, layout.pp - 1):
        table = weight_map.padded_vocab(layout.tp) // layout.tp * weight_map.model["hidden_size"]
        sent["embedding", "allreduce"] += FLOAT * table
    return +sent


def _gathered(training: Training, elements: dict[str, int]) -> Sent:
    """Each rank gives the shard that it has updated."""
    if not training.distributed_optimizer:
        return Sent()
    ranks = _replicas(training.layout)
    return +Sent({(group, "allgather"): training.itemsize * count // ranks[group] for group, count in elements.items()})
