"""The model as a Hugging Face folder: safetensors gathered at rank 0, config and tokenizer carried along."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megarl.engine.model import Model
from megarl.weights.gather import gather_full, plan_gather

CARRIED = ("*.json", "*.txt", "*.model", "*.jinja")


def export_hf(model: Model, source: str, out: Path, dtype: torch.dtype | None = None) -> None:
    """Writes `out`, whole or not at all. `source`: the Hugging Face folder whose config and tokenizer are carried along."""
    plan = plan_gather(model.weight_map, model.parallel.layout)
    dtype = dtype or model.config.params_dtype
    tensors = dict(gather_full(plan, model.weight_map, model.params(), model.parallel.coord.rank, dtype))
    if model.parallel.is_main:
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for pattern in CARRIED:
            for file in Path(source).glob(pattern):
                if file.name != "model.safetensors.index.json":
                    shutil.copy(file, partial)
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial / "model.safetensors", {"format": "pt"})
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    dist.barrier()
