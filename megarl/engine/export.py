"""The model as a Hugging Face folder: safetensors streamed through rank 0, config and tokenizer carried along."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megarl.checkpoints import hf_files
from megarl.engine.model import Model
from megarl.folders import begin, finish
from megarl.weights.files.hf_folder import SHARD_BYTES, ShardedWriter, carry_files, plan_shards
from megarl.weights.files.megatron_folder import open_weights
from megarl.weights.files.raw_file import Spec
from megarl.weights.files.tensors import bits_of, name_of
from megarl.weights.reshard.gather import gather_full, plan_gather


def export_hf(
    model: Model,
    source: str,
    out: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    told: Callable[[], None] = lambda: None,
) -> None:
    """Writes `out`, which must not exist, whole or not at all. Memory at rank 0: a bucket of weights.

    source: the folder that the model was filled from: its config, its tokenizer and its multi-token prediction layers,
    which are not trained, are carried along. told: called after each tensor, on every rank.
    """
    plan = plan_gather(model.weight_map, model.parallel.layout)
    dtype = dtype or model.config.params_dtype
    tensors = gather_full(plan, model.weight_map, model.params(), model.parallel.coord.rank, dtype)
    if model.parallel.is_main:
        partial = begin("the export's folder", out)
        wide, shapes = model.weight_map.hf_float32, model.weight_map.hf_shapes
        specs = {
            name: Spec("float32", shape) for name, shape in shapes.items() if name in wide
        }  # in the order of gather_full
        specs |= {name: Spec(name_of(dtype), shape) for name, shape in shapes.items() if name not in wide}
        with open_weights(source, model.weight_map) as reader:
            carried = reader.carried(model.weight_map)
            writer = ShardedWriter(
                partial, plan_shards(specs | {name: reader.spec(name) for name in carried}, shard_bytes)
            )
            for name, tensor in tensors:
                writer.write(name, bits_of(tensor))
                told()
            for name in carried:
                writer.write(name, reader.whole_bits(name))
                told()
        writer.finish()
        carry_files(hf_files(source), partial, name_of(dtype))
        finish("the export's folder", out)
    else:
        for _ in tensors:
            told()
    dist.barrier(group=model.parallel.host_group)
