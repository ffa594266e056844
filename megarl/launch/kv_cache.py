"""Memory of a rollout server's KV cache, from config.json: what a request takes, and what a shared GPU leaves."""

from __future__ import annotations

from math import prod
from typing import Any

from megarl.config import Config
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap

BLOCK = 32  # tokens of a block of the cache, as megarl/server/supervise.py asks for on a CPU
ON_A_CPU_GIB = 0.25  # where rollout.kv_cache_gib is unset
# of a GPU that both engines share, beside weights and cache: two contexts, NCCL, graphs, a prefill, buckets of a sync
RESERVE = 6 * 2**30


def head_width(model: dict[str, Any]) -> int:
    """Width of a head in vLLM's cache: of keys and values alike, on a CPU without MLA's compression."""
    if model.get("multi_latent_attention"):
        return model["qk_head_dim"] + model["qk_pos_emb_head_dim"]
    return model["kv_channels"]


def bytes_per_token(config: Config, model: dict[str, Any], on_gpu: bool) -> int:
    """Of one rank of a server, over all layers."""
    rollout = config.rollout
    element = 1 if rollout.kv_cache_dtype == "fp8" else _itemsize(config, on_gpu)
    if model.get("multi_latent_attention") and on_gpu:
        width = model["kv_lora_rank"] + model["qk_pos_emb_head_dim"]
    else:
        width = 2 * max(1, model["num_query_groups"] // rollout.tp) * head_width(model)
    return model["num_layers"] * width * element


def request_bytes(config: Config, model: dict[str, Any], on_gpu: bool) -> int:
    """One request of the longest kind, and the block that vLLM keeps empty."""
    blocks = -(-config.server_context // BLOCK) + 1
    return blocks * BLOCK * bytes_per_token(config, model, on_gpu)


def colocated_bytes(config: Config, weight_map: WeightMap, gpu_bytes: int) -> int:
    """What a GPU of gpu_bytes has for the cache beside the weights of a trainer rank and of a rollout rank, at most
    what rollout.max_num_seqs requests can use. May be negative.
    """
    layout = Layout(**config.parallel.model_dump(), world=config.launch.trainers)
    trained = 4 if config.engine.dtype == "float32" else 2
    stages = [layout.coord(stage * (layout.world // layout.pp)) for stage in range(layout.pp)]
    trainer = max(
        sum(prod(param.shape) * (4 if param.buffer else trained) for param in weight_map.params(layout, at))
        for at in stages
    )
    rollout = sum(prod(shape) for shape in weight_map.hf_shapes.values()) * _itemsize(config, True) // config.rollout.tp
    left = int(config.rollout.gpu_memory_utilization * gpu_bytes) - trainer - rollout - RESERVE
    return min(left, config.rollout.max_num_seqs * request_bytes(config, weight_map.model, True))


def _itemsize(config: Config, on_gpu: bool) -> int:
    return 4 if config.rollout_dtype(on_gpu=on_gpu) == "float32" else 2
