"""What a rollout rank will receive, computed by the rank itself from a few inputs that it is told once.

So nobody lists what is another's: rank 0 tells every server the same inputs, whatever the number of rollout ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from megarl.weights.buckets import fill_buckets
from megarl.weights.map.layout import Layout
from megarl.weights.map.relations import HfSlice
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.rect import Rect, Shape
from megarl.weights.reshard.message import Manifest, Message, TensorShard
from megarl.weights.reshard.plan import Plan, make_plan
from megarl.weights.reshard.rollout_layout import RolloutLayout


def wire_dtypes(weight_map: WeightMap, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype in which each Hugging Face tensor is sent."""
    return {name: torch.float32 if name in weight_map.hf_float32 else dtype for name in weight_map.hf_shapes}


def slice_plan(weight_map: WeightMap, train: Layout, rollout: RolloutLayout, dtype: torch.dtype) -> Plan:
    """The plan that both ends follow under sync.transport reshard."""
    return make_plan(train, rollout, weight_map, itemsize=dtype.itemsize)


def slice_manifest(plan: Plan, weight_map: WeightMap, dtype: torch.dtype, rank: int) -> Manifest:
    """Of rollout rank `rank`, under sync.transport reshard."""
    dtypes = wire_dtypes(weight_map, dtype)
    shards = {
        name: TensorShard(weight_map.hf_shapes[name], rect, dtypes[name]) for name, rect in plan.shards(rank).items()
    }
    buckets: list[list[Message[HfSlice]]] = [[] for _ in range(plan.buckets)]
    for message in plan.receives(rank):
        buckets[message.bucket].append(message)
    return Manifest(shards, tuple(map(tuple, buckets)))


def whole_manifest(shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], bucket_bytes: int) -> Manifest:
    """Of a broadcast: every tensor whole, from rank 0, in the order of `shapes`."""
    shards = {name: TensorShard(shape, Rect.whole(shape), dtypes[name]) for name, shape in shapes.items()}
    buckets = fill_buckets(((name, shard.nbytes) for name, shard in shards.items()), bucket_bytes)
    return Manifest(
        shards,
        tuple(
            (Message(number, 0, None, tuple(HfSlice(name, shards[name].rect) for name in names)),)
            for number, names in enumerate(buckets)
        ),
    )


def slice_inputs(weight_map: WeightMap, train: Layout, rollout: RolloutLayout, dtype: torch.dtype) -> dict[str, Any]:
    """What manifest_from needs under sync.transport reshard, as plain JSON."""
    return {
        "hf_config": weight_map.hf_config,
        "train": asdict(train),
        "rollout": asdict(rollout),
        "dtype": str(dtype).removeprefix("torch."),
    }


def whole_inputs(shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], bucket_bytes: int) -> dict[str, Any]:
    """What manifest_from needs under sync.transport broadcast, as plain JSON."""
    tensors = {name: [shape, str(dtypes[name]).removeprefix("torch.")] for name, shape in shapes.items()}
    return {"tensors": tensors, "bucket_bytes": bucket_bytes}


def manifest_from(inputs: dict[str, Any], rank: int) -> Manifest:
    """The manifest of rollout rank `rank`, from slice_inputs or whole_inputs."""
    if "tensors" in inputs:
        shapes = {name: tuple(shape) for name, (shape, _) in inputs["tensors"].items()}
        dtypes = {name: getattr(torch, dtype) for name, (_, dtype) in inputs["tensors"].items()}
        return whole_manifest(shapes, dtypes, inputs["bucket_bytes"])
    weight_map, dtype = WeightMap(inputs["hf_config"]), getattr(torch, inputs["dtype"])
    plan = slice_plan(weight_map, Layout(**inputs["train"]), RolloutLayout(**inputs["rollout"]), dtype)
    return slice_manifest(plan, weight_map, dtype, rank)
