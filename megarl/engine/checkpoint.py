"""Checkpoints of a run: megatron-core's torch_dist format, made whole by a rename.

A checkpoint is written under a name that starts with a dot and renamed when everything is on disk, so a folder
checkpoints/step_N is always whole, whatever killed the run.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megarl.checkpoints import HF_FILES, STATE, hf_files, whole_checkpoints
from megarl.engine.adam_fixes import after_loading, before_loading, before_saving, restore_step_0
from megarl.engine.step import Engine
from megarl.errors import UserError
from megarl.weights.files.hf_folder import carry_files, carry_tensors
from megarl.weights.files.megatron_folder import open_weights

CRITIC = "critic"


def save_checkpoint(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], keep: int, critic: Engine | None = None
) -> Path:
    """Writes folder/step_N with model, optimizer, schedule, generator, `state` (plain JSON), config.json and tokenizer.

    Keeps the newest `keep`. A checkpoint so needs nothing else: it can be converted, and model.path can name it. A
    critic lies in a folder of its own below it.
    """
    main = dist.get_rank() == 0
    partial, whole = folder / f".step_{step}.partial", folder / f"step_{step}"
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded(engine, loading=False), str(partial))
    if critic is not None:
        if main:
            (partial / CRITIC).mkdir()
        dist.barrier()
        dist_checkpointing.save(_sharded(critic, loading=False), str(partial / CRITIC))
        state = {**state, "critic_scheduler": critic.scheduler.state_dict()}
    dist.barrier()
    if main:
        state = {
            **state,
            "step": step,
            "scheduler": engine.scheduler.state_dict(),
            "rng": torch.get_rng_state().tolist(),
        }
        (partial / STATE).write_text(json.dumps(state))
        (partial / HF_FILES).mkdir()
        _carry(engine, whole_checkpoints(folder)[-1:], partial / HF_FILES)
        shutil.rmtree(whole, ignore_errors=True)
        _flush_to_disk(partial)
        partial.rename(whole)
        for old in whole_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return whole


def _carry(engine: Engine, last: list[Path], target: Path) -> None:
    """config.json, tokenizer and untrained tensors of the model's
    source; these are links into the last checkpoint, if there is one.
    """
    model = engine.model
    carry_files(hf_files(model.source), target)
    with open_weights(model.source, model.weight_map) as reader:
        known = last[0] / HF_FILES if last else hf_files(model.source)
        carry_tensors(known, target, reader.carried(model.weight_map), reader.spec, reader.whole)


def load_checkpoint(engine: Engine, path: Path, critic: Engine | None = None) -> dict[str, Any]:
    """Fills the engine, and the critic if there is one, from a whole checkpoint; returns its `state`."""
    state = json.loads((path / STATE).read_text())
    if critic is not None:
        if "critic_scheduler" not in state:
            raise UserError(
                f"checkpoint {str(path)!r} has no critic; resume with the objective it was written with, or give "
                "another run.dir"
            )
        _load(critic, path / CRITIC, state["critic_scheduler"])
    _load(engine, path, state["scheduler"])
    torch.set_rng_state(torch.tensor(state["rng"], dtype=torch.uint8))
    return state


def _load(engine: Engine, path: Path, schedule: dict[str, Any]) -> None:
    before_loading(engine.optimizer)
    try:
        loaded = dist_checkpointing.load(_sharded(engine, loading=True), str(path))
    except Exception as error:
        raise UserError(
            f"checkpoint {str(path)!r} does not fit this model or layout ({' '.join(str(error).split())[:200]}); "
            "resume with the config it was written with, or give another run.dir"
        ) from error
    for i, chunk in enumerate(engine.model.bare):
        wrong = chunk.load_state_dict(loaded[_key(engine, i)], strict=False)
        missing = [name for name in [*wrong.missing_keys, *wrong.unexpected_keys] if "_extra_state" not in name]
        if missing:
            raise UserError(f"checkpoint {str(path)!r} does not fit this model: {missing[0]!r}; give another run.dir")
    restore_step_0(loaded["optimizer"])
    engine.optimizer.load_state_dict(loaded["optimizer"])
    after_loading(engine.optimizer)
    engine.scheduler.load_state_dict(schedule)


def _key(engine: Engine, chunk: int) -> str:
    return "model" if len(engine.model.bare) == 1 else f"model{chunk}"


def _sharded(engine: Engine, loading: bool) -> dict[str, Any]:
    if not loading:
        before_saving(engine.optimizer)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        # a key for every layer, in dense models too: what megarl.weights.files.megatron_folder reads
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    sharded: dict[str, Any] = {
        _key(engine, i): chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(engine.model.bare)
    }
    sharded["optimizer"] = engine.optimizer.sharded_state_dict(sharded, is_loading=loading, metadata=metadata)
    return sharded


def _flush_to_disk(folder: Path) -> None:
    """The rename must not reach the disk before what it names."""
    for path in [p for p in folder.rglob("*") if p.is_file()] + [folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
