"""Memory of a trainer rank, computed from config.json and the layout alone.

Parameters, gradients and optimizer are held against running ranks (tests/parallel/ranks.py, planned_memory), the total
against the peak of a simulated GPU (tests/unit/test_simulate.py).

States are what megatron-core allocates for the parameters of the weight map: gradients in float32,
Adam with float32 moments and, in bfloat16, a float32 copy of the parameters. The distributed
optimizer divides moments and copy by the replicas of a parameter; what of them lies in host memory
(engine.optimizer_offload_fraction) has its gradients there too. PPO's critic has states of its own beside the policy's,
and the two take turns; the reference of the KL term lies in host memory. Activations count what the modules of
megarl/engine keep for the backward pass. What a sync keeps is the plan's (megarl/weights/reshard/plan.py).
Fragmentation is in none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import Param, WeightMap

RECOMPUTE = ("none", "selective", "full")  # engine.recompute
GIB = 2**30
FREE = 0.1  # of a GPU: CUDA, buffers of NCCL and fragmentation, which no plan and no trace has
ON_HOST = 16  # bytes of host memory a parameter: master weight, two moments, gradient


def room(gpu: float) -> float:
    """Bytes of a GPU that a rank may take: the one rule of plan, search and trace."""
    return gpu * (1 - FREE)


def verdict(needed: float, gpu: float) -> str:
    """In words. needed: bytes at the worst moment, checkpoint and weight sync among them."""
    word = "fits" if needed <= room(gpu) else "does not fit"
    return f"{word}: {needed / GIB:.3f} of {room(gpu) / GIB:g} GiB ({gpu / GIB:g}, of which {FREE:.0%} stay free)"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of a pipeline stage. logits, temporaries: of the backward pass, the former at its start, the
    latter in a layer, when the logits are gone. save: of a checkpoint, between steps. sync: messages of a weight sync,
    kept for the next. host: of host memory, for the optimizer and the reference.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporaries: int
    save: int = 0
    sync: int = 0
    host: int = 0

    @property
    def step(self) -> int:
        """At the peak of a step."""
        return self._states + self.activations + max(self.logits, self.temporaries)

    @property
    def total(self) -> int:
        return max(self.step, self._states + self.save)

    @property
    def _states(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.sync


@dataclass(frozen=True)
class Training:
    """itemsize: bytes of a parameter (4 or 2). tokens: of a micro-batch,
    of which as many as the schedule asks for are in flight. offload: share of the optimizer in host memory.
    critic, reference: whether there is one beside the policy.
    """

    layout: Layout
    itemsize: int
    distributed_optimizer: bool
    recompute: str
    tokens: int
    offload: float = 0.0
    critic: bool = False
    reference: bool = False


class Held(NamedTuple):
    """Elements of one rank's parameters. whole: of the dense ones, those that no tensor-parallel rank cuts. buffers:
    not trained, float32.
    """

    dense: int = 0
    expert: int = 0
    whole: int = 0
    buffers: int = 0

    def times(self, count: int) -> Held:
        return Held(*(count * n for n in self))

    def plus(self, other: Held) -> Held:
        return Held(*(a + b for a, b in zip(self, other, strict=True)))


def held_of(params: Iterable[Param]) -> Held:
    dense = expert = whole = buffers = 0
    for param in params:
        count = prod(param.shape)
        if param.buffer:
            buffers += count
        elif param.expert:
            expert += count
        else:
            dense += count
            whole += 0 if param.split else count
    return Held(dense, expert, whole, buffers)


def stage_held(weight_map: WeightMap, layout: Layout, stage: int) -> Held:
    return held_of(weight_map.params(layout, layout.coord(stage * (layout.world // layout.pp))))


def stage_memory(weight_map: WeightMap, training: Training, stage: int, held: Held | None = None) -> Memory:
    """All ranks of a stage hold the same shapes. held: what it holds, where that is known already."""
    layout = training.layout
    held = held or stage_held(weight_map, layout, stage)
    models = [held, critic_held(weight_map, layout, stage, held)] if training.critic else [held]
    trained = sum(one.dense + one.expert for one in models)
    moments = 8 + (4 if training.itemsize == 2 else 0)  # bytes a parameter
    stepped = sum(stepped_params(one, training) for one in models)
    hosted = round(training.offload * stepped)
    last = stage == layout.pp - 1
    return Memory(
        parameters=sum(_parameter_bytes(one, training) for one in models),
        gradients=4 * trained,
        optimizer=moments * (stepped - hosted),
        activations=_activations(weight_map, training, stage),
        logits=_logits(weight_map, training) if last else 0,
        temporaries=_temporaries(weight_map, training, stage),
        save=max(_save(one, layout) for one in models) if training.distributed_optimizer else 0,
        host=ON_HOST * hosted + (_parameter_bytes(held, training) if training.reference else 0),
    )


def critic_held(weight_map: WeightMap, layout: Layout, stage: int, held: Held) -> Held:
    """The policy's trunk, with one number a row in place of the output layer (megarl/engine/critic.py)."""
    if stage < layout.pp - 1:
        return held
    (output,) = (entry for entry in weight_map.entries if entry.name == "output_layer.weight")
    there = layout.pp > 1 or not output.copy  # else the embedding is the output layer
    cut = held_of(weight_map.params_of(output, layout, layout.coord(0))).dense if there else 0
    hidden: int = weight_map.model["hidden_size"]
    return held._replace(dense=held.dense - cut + hidden, whole=held.whole + hidden)


def _parameter_bytes(held: Held, training: Training) -> int:
    return training.itemsize * (held.dense + held.expert) + 4 * held.buffers


def _save(held: Held, layout: Layout) -> int:
    """megatron-core gathers the distributed optimizer's state on the device, a buffer of parameters at a time: its own
    float32 part and those of all ranks (DistributedOptimizer.get_parameter_state_dp_zero).
    """
    buffers = [(held.dense, layout.dp * layout.cp), (held.expert, layout.edp)]
    if layout.ep == 1 and layout.tp <= layout.etp:  # experts lie among the others
        buffers = [(held.dense + held.expert, layout.dp * layout.cp)]
    return max(4 * (count + count // ranks) for count, ranks in buffers)


def stepped_params(held: Held, training: Training) -> int:
    """Parameters that a rank steps: all that it holds, or its share of them."""
    if not training.distributed_optimizer:
        return held.dense + held.expert
    layout = training.layout
    return held.dense // (layout.dp * layout.cp) + held.expert // layout.edp


def layer_kinds(weight_map: WeightMap, layout: Layout, stage: int, chunk: int) -> dict[bool, int]:
    """How many layers of a model chunk have experts (True) and have none; without those of which there are none."""
    layers = layout.stage_layers(weight_map.num_layers, stage, chunk)
    start, stop = (bisect_left(weight_map.moe_layers, edge) for edge in (layers.start, layers.stop))
    kinds = {True: stop - start, False: len(layers) - (stop - start)}
    return {moe: count for moe, count in kinds.items() if count}


def one_of_each_kind(weight_map: WeightMap) -> int:
    """Layers from the first on that hold one with experts and one without, where the model has both."""
    moe = weight_map.moe_layers
    dense = sorted(set(range(weight_map.num_layers)) - set(moe))
    return 1 + max(kind[0] for kind in (moe, dense) if kind)


def held_at_once(weight_map: WeightMap, layout: Layout, stage: int) -> dict[bool, int]:
    """Layers with experts (True) and without, each as often as a stage has micro-batches of it in flight."""
    found = {True: 0, False: 0}
    for chunk in range(layout.vpp):
        for moe, count in layer_kinds(weight_map, layout, stage, chunk).items():
            found[moe] += count * _micro_batches_in_flight(layout, stage, chunk)
    return {moe: count for moe, count in found.items() if count}


def _logits(weight_map: WeightMap, training: Training) -> int:
    """Logits and their gradient; the kernels that make it hold nothing beside."""
    rows = training.tokens // training.layout.cp
    count = rows * weight_map.padded_vocab(training.layout.tp) // training.layout.tp
    return 2 * training.itemsize * count


def _temporaries(weight_map: WeightMap, training: Training, stage: int) -> int:
    """Of the largest MLP of the stage, in its backward pass: gradients of the rows, and of one product's weights before
    they are added up; or, where rows go to other ranks' experts, in its forward pass: what was sent, what has come, and
    the results as they are sent back. Under full recompute what the layer has computed again too.
    """
    model, layout = weight_map.model, training.layout
    kinds = {moe for chunk in range(layout.vpp) for moe in layer_kinds(weight_map, layout, stage, chunk)}
    hidden, elements = model["hidden_size"], 0
    rows = training.tokens // layout.cp
    if True in kinds:
        width = model["moe_ffn_hidden_size"] // layout.etp
        weights = model["num_moe_experts"] // layout.ep * 2 * width * hidden
        routed = _routed(model, layout, rows)
        elements = routed * (2 * hidden + 3 * width) + weights
        if layout.ep * layout.etp > 1:
            copies = 2 + 2 / layout.etp + (2 + 2 / layout.etp if layout.etp > 1 else 0)  # ETP adds up in float32
            elements = max(elements, int(routed * copies * hidden))
    if False in kinds:
        width = model["ffn_hidden_size"] // layout.tp
        elements = max(elements, rows * (hidden + 5 * width))
    again = 0
    if training.recompute == "full":
        again = max(layer_activations(weight_map, training, moe=moe) for moe in kinds)
    return training.itemsize * elements + again


def _routed(model: dict[str, Any], layout: Layout, rows: int) -> int:
    """Rows of a rank's experts, on average; the busiest rank of an imbalanced layer has more."""
    return rows // layout.tp * model["moe_router_topk"] * layout.etp


def _activations(weight_map: WeightMap, training: Training, stage: int) -> int:
    """With the rows that sequence parallelism gathers, in a buffer that stays."""
    layout = training.layout
    whole = training.tokens // layout.cp * weight_map.model["hidden_size"] * training.itemsize
    gathered = whole if layout.tp > 1 else 0
    layers = held_at_once(weight_map, layout, stage)
    if training.recompute == "full":
        return gathered + sum(layers.values()) * whole // layout.tp
    return gathered + sum(count * layer_activations(weight_map, training, moe=moe) for moe, count in layers.items())


def _micro_batches_in_flight(layout: Layout, stage: int, chunk: int) -> int:
    """Micro-batches whose backward pass is still to come, at the worst moment (1F1B; interleaved 1F1B)."""
    if layout.vpp == 1:
        return layout.pp - stage
    ahead = (
        2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    )  # of all chunks together, filled chunk by chunk
    rounds, rest = divmod(ahead, layout.pp * layout.vpp)
    return rounds * layout.pp + min(max(rest - chunk * layout.pp, 0), layout.pp)


def layer_activations(weight_map: WeightMap, training: Training, *, moe: bool) -> int:
    """Bytes that one layer keeps of one micro-batch, without recompute or with the selective one (attention's core)."""
    model, layout = weight_map.model, training.layout
    rows = training.tokens // layout.cp
    hidden = 2 * (2 * rows // layout.tp * model["hidden_size"])  # two norms: what goes in and what comes out
    attention = rows // layout.tp * _attention_width(model, training.recompute)
    return training.itemsize * (hidden + attention + _mlp(model, layout, rows, moe))


def _attention_width(model: dict[str, Any], recompute: str) -> int:
    """Elements a row over all heads. q, k, v are kept as projected, q and k as normed and as rotated, v once more for
    attention; and the result. Of latent attention q and k as put together, v in their width, and both results.
    """
    heads = model["num_attention_heads"]
    if model.get("multi_latent_attention"):
        key = model["qk_head_dim"] + model["qk_pos_emb_head_dim"]
        latent = (model.get("q_lora_rank") or 0) + model["kv_lora_rank"] + model["qk_pos_emb_head_dim"]
        value = model["v_head_dim"]
        inside = 4 * key  # q, k, v in one width, and the result
        if recompute == "selective":
            inside = 2 * key + value
        return 2 * latent + heads * (inside + value)
    query, key_value = heads * model["kv_channels"], 2 * model["num_query_groups"] * model["kv_channels"]
    projected = query + key_value + (query if model.get("qk_layernorm") else 0)
    rotated = query + key_value // 2 + 4 * model["kv_channels"]  # and its cosines and sines, in float32
    return projected + rotated + query + (0 if recompute == "selective" else key_value // 2)


def _mlp(model: dict[str, Any], layout: Layout, rows: int, moe: bool) -> int:
    """Elements of one layer. A dense gated MLP keeps fc1's result,
    silu(gate) and the product; grouped experts keep fc1's result.
    """
    if not moe:
        return rows * 4 * model["ffn_hidden_size"] // layout.tp
    routed = _routed(model, layout, rows)
    experts = routed * (model["hidden_size"] + 2 * model["moe_ffn_hidden_size"] // layout.etp)
    router = rows // layout.tp * (6 * model["num_moe_experts"] + 14 * model["moe_router_topk"])
    shared = model.get("moe_shared_expert_intermediate_size") or 0
    return experts + router + rows * 4 * shared // layout.tp
