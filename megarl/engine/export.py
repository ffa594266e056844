"""The model as a Hugging Face folder: safetensors gathered at rank 0, config and tokenizer carried along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megarl.engine.model import Model
from megarl.weights.gather import gather_full, plan_gather
from megarl.weights.load import INDEX, HfReader
from megarl.weights.source import exported_config

CARRIED = ("*.json", "*.txt", "*.model", "*.jinja")


def export_hf(model: Model, source: str, out: Path, dtype: torch.dtype | None = None) -> None:
    """Writes `out`, whole or not at all.

    source: the Hugging Face folder that the model was filled from: its config, its tokenizer and its multi-token prediction layers, which
    are not trained, are carried along.
    """
    plan = plan_gather(model.weight_map, model.parallel.layout)
    dtype = dtype or model.config.params_dtype
    tensors = dict(gather_full(plan, model.weight_map, model.params(), model.parallel.coord.rank, dtype))
    if model.parallel.is_main:
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for pattern in CARRIED:
            for file in Path(source).glob(pattern):
                if file.name != INDEX:
                    shutil.copy(file, partial)
        (partial / "config.json").write_text(json.dumps(exported_config(model.weight_map.hf), indent=2) + "\n")
        with HfReader(source) as reader:
            tensors |= {name: reader.whole(name) for name in reader.carried(model.weight_map)}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial / "model.safetensors", {"format": "pt"})
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    dist.barrier()
