"""Seconds of the training part of a step, by arithmetic: what a layout must compute, move and send, over the rates of a
card and its links. Printed with its assumptions; it ranks layouts, and no row of it is a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.estimate.memory import Held, Training, layer_kinds, stepped_params
from megarl.estimate.traffic import Sent, Traffic
from megarl.weights.map.weight_map import WeightMap

MATRIX, ATTENTION = 0.75, 0.45  # of the matrix rate, that products and the attention kernel reach
BACKWARD, ATTENTION_BACKWARD = 2.0, 2.5  # forward passes that a backward pass costs
ADAM = 30  # bytes an update of a parameter reads and writes
HOST_COPY, HOST_LINK = 40e9, 25e9  # bytes/s a GPU: of host memory, read plus written, and to and from it
HOST_MOVED = 6  # bytes a parameter stepped on the host: its gradient there, its weight back
ROUTED_COPIES, DENSE_COPIES = 8, 20  # of a row: to the experts, through them and back; norms, rotation, residuals


@dataclass(frozen=True)
class Card:
    """memory: bytes. copy: bytes/s, read plus written. matmul, peak: FLOP/s in bf16, as seen and on the data sheet."""

    name: str
    memory: float
    copy: float
    matmul: float
    peak: float = 989e12


CARDS = {"h100": Card("H100 80 GB", 78 * 2**30, 3.0e12, 798e12), "h200": Card("H200", 139 * 2**30, 4.3e12, 788e12)}


@dataclass(frozen=True)
class Machine:
    """gpus: a host. inside, link: bytes/s of a GPU in each direction, to others of its host and between hosts."""

    card: Card
    gpus: int
    link: float
    inside: float = 350e9


@dataclass(frozen=True)
class Work:
    """A step: tokens of all its mini-batches together. sequence: tokens of a response with its prompt, on average."""

    tokens: int
    minibatches: int
    sequence: int


@dataclass(frozen=True)
class Seconds:
    """Of the training part of a step, by what it waits for; nothing overlaps. idle: stages that wait for others."""

    compute: float
    tensor: float
    experts: float
    pipeline: float
    replicas: float
    optimizer: float
    idle: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def step_seconds(
    weight_map: WeightMap,
    training: Training,
    stages: dict[int, tuple[Held, Traffic]],
    work: Work,
    machine: Machine,
) -> Seconds:
    """By the slowest of these pipeline stages."""
    layout = training.layout
    packs = packs_of(training, work)
    passes = [
        _stage_passes(weight_map, training, stage, traffic, work, machine) for stage, (_, traffic) in stages.items()
    ]
    slowest = max(passes, key=sum)
    batches = packs * work.minibatches
    idle = (layout.pp - 1) / layout.vpp * work.minibatches * sum(slowest)
    reduced = max(_link_seconds(training, t.reduced, machine) for _, t in stages.values())
    gathered = max(_link_seconds(training, t.gathered, machine) for _, t in stages.values())
    update = max(_optimizer_seconds(training, held, machine) for held, _ in stages.values())
    compute, tensor, experts, pipeline = (batches * part for part in slowest)
    return Seconds(
        compute,
        tensor,
        experts,
        pipeline,
        work.minibatches * (reduced + gathered),
        work.minibatches * update,
        idle,
    )


def packs_of(training: Training, work: Work) -> int:
    """Micro-batches of a replica in one mini-batch, full ones; under the interleaved schedule whole rounds of them."""
    layout = training.layout
    packs = max(1, -(-work.tokens // (work.minibatches * layout.dp * training.tokens)))
    return -(-packs // layout.packs_multiple) * layout.packs_multiple


def _stage_passes(
    weight_map: WeightMap, training: Training, stage: int, traffic: Traffic, work: Work, machine: Machine
) -> tuple[float, float, float, float]:
    """(compute, tensor and context, experts, pipeline) seconds of one pack: forward, backward, and where there is more
    than one mini-batch once more forward, for pi_old.
    """
    forward, attention = _forward_seconds(weight_map, training, stage, work, machine.card)
    repeated = {"none": 0.0, "selective": attention, "full": forward + attention}[training.recompute]
    old = forward + attention if work.minibatches > 1 else 0.0
    compute = (1 + BACKWARD) * forward + (1 + ATTENTION_BACKWARD) * attention + repeated + old
    sent = traffic.forward + traffic.backward + (traffic.forward if work.minibatches > 1 else Sent())
    by_kind = {name: Sent({k: v for k, v in sent.items() if _kind(k[0]) == name}) for name in KINDS}
    tensor, experts, pipeline = (_link_seconds(training, by_kind[name], machine) for name in KINDS)
    return compute, tensor, experts, pipeline


KINDS = ("tensor", "experts", "pipeline")


def _kind(group: str) -> str:
    return "tensor" if group in ("tensor", "context") else "pipeline" if group == "pipeline" else "experts"


def _forward_seconds(
    weight_map: WeightMap, training: Training, stage: int, work: Work, card: Card
) -> tuple[float, float]:
    """(all but the attention kernel, the attention kernel) of one pack through a stage."""
    layout, model = training.layout, weight_map.model
    rest = kernel = 0.0
    for chunk in range(layout.vpp):
        for moe, count in layer_kinds(weight_map, layout, stage, chunk).items():
            rest += count * _layer_seconds(weight_map, training, moe, card)
            kernel += count * attention_flops(model, training.tokens, work.sequence) / (layout.tp * layout.cp)
    if stage == layout.pp - 1:
        rows = training.tokens // layout.cp
        columns = weight_map.padded_vocab(layout.tp) // layout.tp
        rest += 2 * rows * columns * model["hidden_size"] / (MATRIX * card.matmul)
        rest += 3 * rows * columns * training.itemsize / card.copy
    return rest, kernel / (ATTENTION * card.matmul)


def _layer_seconds(weight_map: WeightMap, training: Training, moe: bool, card: Card) -> float:
    """Forward, without the attention kernel: products by the matrix rate or by reading the weights, rows by copies."""
    layout, model = training.layout, weight_map.model
    rows = training.tokens // layout.cp
    own, hidden = rows // layout.tp, model["hidden_size"]
    dense = attention_weights(model) + dense_weights(model, moe)
    seconds = _product_seconds(rows, dense // layout.tp, dense // layout.tp, training.itemsize, card)
    seconds += DENSE_COPIES * own * hidden * training.itemsize / card.copy
    if moe:
        expert, top = expert_weights(model) // layout.etp, model["moe_router_topk"]
        local = expert * model["num_moe_experts"] // layout.ep
        seconds += _product_seconds(own * top * layout.etp, expert, local, training.itemsize, card)
        seconds += ROUTED_COPIES * own * top * layout.etp * hidden * training.itemsize / card.copy
    return seconds


def _product_seconds(rows: int, weights_of_row: int, weights: int, itemsize: int, card: Card) -> float:
    return max(2 * rows * weights_of_row / (MATRIX * card.matmul), weights * itemsize / card.copy)


def attention_weights(model: dict[str, Any]) -> int:
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    if model.get("multi_latent_attention"):
        key, latent, rope = model["qk_head_dim"], model["kv_lora_rank"], model["qk_pos_emb_head_dim"]
        query = model.get("q_lora_rank")
        into_query = hidden * query + query * heads * (key + rope) if query else hidden * heads * (key + rope)
        return (
            into_query
            + hidden * (latent + rope)
            + (latent + hidden) * heads * model["v_head_dim"]
            + latent * (heads * key)
        )
    return hidden * model["kv_channels"] * 2 * (heads + model["num_query_groups"])


def dense_weights(model: dict[str, Any], moe: bool) -> int:
    """Of the MLP that every row goes through; of a MoE layer the shared expert and the router."""
    hidden = model["hidden_size"]
    if moe:
        shared = model.get("moe_shared_expert_intermediate_size") or 0
        return 3 * hidden * shared + hidden * model["num_moe_experts"]
    return 3 * hidden * model["ffn_hidden_size"]


def expert_weights(model: dict[str, Any]) -> int:
    return 3 * model["hidden_size"] * model["moe_ffn_hidden_size"]


def attention_flops(model: dict[str, Any], tokens: int, sequence: int) -> float:
    """Of one layer's kernel, forward; causal: half of the square."""
    heads = model["num_attention_heads"]
    if model.get("multi_latent_attention"):
        width = model["qk_head_dim"] + model["qk_pos_emb_head_dim"] + model["v_head_dim"]
    else:
        width = 2 * model["kv_channels"]
    return 2 * tokens * (sequence / 2) * heads * width


def model_flops(weight_map: WeightMap, tokens: int, sequence: int) -> float:
    """Forward and backward of these tokens, without recompute: what MFU counts."""
    model, top = weight_map.model, weight_map.top_k
    total = 0.0
    moe = len(weight_map.moe_layers)
    for kind, count in ((True, moe), (False, weight_map.num_layers - moe)):
        weights = attention_weights(model) + (dense_weights(model, kind) if count else 0)
        weights += top * expert_weights(model) if kind and count else 0
        total += count * (2 * tokens * weights + attention_flops(model, tokens, sequence))
    return 3 * (total + 2 * tokens * weight_map.vocab_size * model["hidden_size"])


def _link_seconds(training: Training, sent: Sent, machine: Machine) -> float:
    return sum(_seconds_of(training, group, kind, size, machine) for (group, kind), size in sent.items())


def _seconds_of(training: Training, group: str, kind: str, size: int, machine: Machine) -> float:
    """By rings, the slowest link of which counts; an all-to-all goes evenly to all."""
    ranks, stride = group_shape(training, group)
    if ranks == 1:
        return 0.0
    if kind == "recv":
        return 0.0  # links take both directions at once
    local = max(1, min(ranks, machine.gpus // stride))
    if kind == "alltoall":
        far, near = size * (ranks - local) / ranks, size * (local - 1) / ranks
        return max(far / machine.link, near / machine.inside)
    speed = machine.inside if ranks <= local else machine.link
    if kind == "send":
        return size / speed
    if kind == "allgather":
        return size * (ranks - 1) / speed
    return size * (ranks - 1) / ranks * (2 if kind == "allreduce" else 1) / speed


def group_shape(training: Training, group: str) -> tuple[int, int]:
    """(ranks of a group, distance of neighbours), in megatron-core's order of ranks: tp-cp-ep-dp-pp."""
    layout = training.layout
    stage = layout.world // layout.pp
    return {
        "tensor": (layout.tp, 1),
        "context": (layout.cp, layout.tp),
        "data": (layout.dp * layout.cp, layout.tp),
        "expert tensor": (layout.etp, 1),
        "expert": (layout.ep, layout.etp),
        "experts": (layout.etp * layout.ep, 1),
        "expert data": (layout.edp, layout.etp * layout.ep),
        "pipeline": (layout.pp, stage),
        "embedding": (2, layout.world - stage),
    }[group]


def _optimizer_seconds(training: Training, held: Held, machine: Machine) -> float:
    stepped = stepped_params(held, training)
    hosted = training.offload * stepped
    on_host = hosted * (ADAM / HOST_COPY + HOST_MOVED / HOST_LINK)
    return (stepped - hosted) * ADAM / machine.card.copy + on_host


def assumptions(machine: Machine, work: Work) -> list[str]:
    card = machine.card
    return [
        f"{card.name}: {card.matmul / 1e12:.0f} TFLOP/s in bf16 products, of which they reach {MATRIX:.0%} and the "
        f"attention kernel {ATTENTION:.0%}; {card.copy / 1e12:g} TB/s read and written; MFU over "
        f"{card.peak / 1e12:.0f}",
        f"links: {machine.inside / 1e9:g} GB/s a GPU to its {machine.gpus - 1} neighbours, {machine.link / 1e9:g} GB/s "
        "between hosts; rings, latency left out; nothing overlaps",
        f"an optimizer in host memory: {HOST_COPY / 1e9:g} GB/s a GPU of it, {HOST_LINK / 1e9:g} GB/s to it and back",
        f"a step: {work.tokens:,} tokens in {work.minibatches} mini-batches, sequences of {work.sequence:,}, packs "
        "full, routes even; its training part alone: pi_old, the policy's updates, gradients summed, Adam; without "
        "what a critic or a reference computes",
    ]
