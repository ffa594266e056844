"""Checkpoints of a run: megatron-core's torch_dist format, made whole by a rename, sealed by checksums.

A checkpoint is written under a name that starts with a dot and renamed when everything is on disk, so a folder
checkpoints/step_N is always whole, whatever killed the run. Its tensors are those of the whole model and of its
optimizer, cut as this layout holds them; every layout reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megarl.announce import announce
from megarl.checkpoints import (
    FILES,
    HF_FILES,
    SEEN_WITHIN_S,
    STATE,
    hf_files,
    remove_leftovers,
    seal,
    state_of,
    whole_checkpoints,
)
from megarl.engine.adam_state import restore_state, sharded_state
from megarl.engine.background import Background, Parts, copied, writers_group
from megarl.engine.model import Model
from megarl.engine.step import Engine
from megarl.errors import UserError
from megarl.rollout.patience import checkpoint_s
from megarl.weights.files.hf_folder import carry_files, carry_tensors
from megarl.weights.files.megatron_folder import open_weights
from megarl.weights.files.torch_dist import TorchDistReader, foreign_names_refused

CRITIC = "critic"
FAILURES = (Exception, CheckpointException)


def save_checkpoint(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], keep: int, critic: Engine | None = None
) -> Path:
    """begin_checkpoint, and waits until it is whole. Collective."""
    begin_checkpoint(engine, folder, step, state, keep, critic).finish()
    return folder / f"step_{step}"


def begin_checkpoint(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], keep: int, critic: Engine | None = None
) -> Background:
    """Begins folder/step_N with model, optimizer, schedule, generator, `state` (plain JSON), config.json and tokenizer.

    When this returns all is copied to host memory. A thread writes it; the folder has its name when all is on disk, and
    the newest `keep` stay. A checkpoint so needs nothing else: it can be converted, and model.path can name it. A
    critic lies in a folder of its own below it. UserError, here or from finish(), where it cannot be written; the
    checkpoints before it stay. Collective; one at a time.
    """
    partial, whole = folder / f".step_{step}.partial", folder / f"step_{step}"
    group = writers_group()
    try:
        if dist.get_rank() == 0:
            remove_leftovers(folder)
            (partial / CRITIC if critic else partial).mkdir(parents=True)
        dist.barrier(group=engine.model.parallel.host_group)
        parts = [copied(_sharded(engine, loading=False), partial)]
        if critic is not None:
            parts.append(copied(_sharded(critic, loading=False), partial / CRITIC))
            state = {**state, "critic_scheduler": critic.scheduler.state_dict()}
    except FAILURES as error:
        if isinstance(error, CheckpointException) and not error.failures:
            dist.barrier(group=engine.model.parallel.host_group)  # another rank knows why and is about to say so
        raise UserError(_cannot(partial, whole, error)) from error
    state = {
        **state,
        "step": step,
        "scheduler": engine.scheduler.state_dict(),
        "rng": torch.get_rng_state().tolist(),
    }
    model, last = engine.model, whole_checkpoints(folder)[-1:]
    writing = _Writing(parts, partial, whole, state, keep, lambda: _carry(model, last, partial / HF_FILES))
    return Background(writing.run, group, checkpoint_s(sum(part.nbytes for part in parts)))


@dataclass
class _Writing:
    """What the ranks' threads do together. carry: writes the Hugging Face files, on rank 0."""

    parts: list[Parts]
    partial: Path
    whole: Path
    state: dict[str, Any]
    keep: int
    carry: Callable[[], None]

    def run(self, group: dist.ProcessGroup) -> None:
        """UserError, the same on every rank, where one of them cannot write."""
        report: dict[str, Any] = {}
        try:
            report["results"] = [part.write() for part in self.parts]
            paths = self.partial.rglob(f"__{dist.get_rank()}_*.distcp")
            report["files"] = {_name(path, self.partial): _sealed_file(path) for path in paths}
        except FAILURES as error:
            report["fault"] = _cause(error)
        main, refusal = dist.get_rank() == 0, [""]
        everyone: list[Any] | None = [None] * dist.get_world_size() if main else None
        dist.gather_object(report, everyone, group=group)
        if everyone is not None:
            try:
                self._complete(everyone)
            except FAILURES as error:
                refusal = [_cannot(self.partial, self.whole, error)]
        dist.broadcast_object_list(refusal, src=0, group=group)
        if refusal[0]:
            raise UserError(refusal[0])

    def _complete(self, everyone: list[dict[str, Any]]) -> None:
        """Rank 0: once all ranks have written, makes it whole and gives it its name."""
        partial = self.partial
        files: dict[str, list[int | str]] = {}
        for rank, report in enumerate(everyone):
            if "fault" in report:
                raise _Fault(f"rank {rank}: {report['fault']}")
            _expect(partial, rank, report["files"])
            files |= report["files"]
        for i, part in enumerate(self.parts):
            part.finish([report["results"][i] for report in everyone])
        self.carry()
        rest = [path for path in partial.rglob("*") if path.is_file() and _name(path, partial) not in files]
        files |= {_name(path, partial): _sealed_file(path) for path in rest}
        (partial / STATE).write_text(json.dumps({**self.state, FILES: files}), encoding="utf-8")
        _flush(partial / STATE)
        for inner in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
            _flush(inner)
        shutil.rmtree(self.whole, ignore_errors=True)
        partial.rename(self.whole)
        _flush(partial.parent)
        for old in whole_checkpoints(partial.parent)[: -self.keep]:
            _remove(old)


def _remove(old: Path) -> None:
    """Under the name of one that is not whole: what a file that is open elsewhere keeps of it on a network file system
    is a leftover, which the next save or start removes. The new one is whole, whatever becomes of this.
    """
    left = old.with_name(f".{old.name}.partial")
    try:
        old.rename(left)
        shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        announce(f"megarl: {old} cannot be removed: {error.strerror}; run.keep is exceeded")


class _Fault(Exception):
    """In words already."""


def _expect(partial: Path, rank: int, files: dict[str, list[int | str]]) -> None:
    """Rank 0 sees what another rank wrote; a network file system may show it late."""
    until = time.monotonic() + SEEN_WITHIN_S
    for name, (size, _) in files.items():
        while not (partial / name).exists() or (partial / name).stat().st_size != size:
            if time.monotonic() > until:
                raise _Fault(f"rank 0 does not see {name} of rank {rank}: run.dir must be one folder for all ranks")
            time.sleep(0.2)


def _cannot(partial: Path, whole: Path, error: BaseException) -> str:
    """Gives back the room that was taken, and says why in one line."""
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(next(path for path in partial.parents if path.exists())).free
    return (
        f"checkpoint {str(whole)!r} cannot be written ({_cause(error)}); {free / 2**20:.0f} MiB are free there "
        "now: make room (run.keep), then the same command goes on from the checkpoint before it"
    )


def _cause(error: BaseException) -> str:
    """The innermost cause, in one line."""
    if isinstance(error, _Fault):
        return str(error)
    if isinstance(error, CheckpointException) and error.failures:
        return _cause(next(iter(error.failures.values()))[0])
    if error.__cause__ is not None:
        return _cause(error.__cause__)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _sealed_file(path: Path) -> list[int | str]:
    _flush(path)
    return seal(path)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _flush(path: Path) -> None:
    """The rename must not reach the disk before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _carry(model: Model, last: list[Path], target: Path) -> None:
    """config.json, tokenizer and untrained tensors of the model's
    source; these are links into the last checkpoint, if there is one.
    """
    target.mkdir()
    carry_files(hf_files(model.source), target)
    with open_weights(model.source, model.weight_map) as reader:
        known = last[0] / HF_FILES if last else hf_files(model.source)
        carry_tensors(known, target, reader.carried(model.weight_map), reader.spec, reader.whole_bits)


def load_checkpoint(engine: Engine, path: Path, critic: Engine | None = None) -> dict[str, Any]:
    """Fills the engine, and the critic if there is one, from a whole checkpoint of any layout; returns its `state`.

    The learning rate and all else that the configuration names stay the configuration's.
    """
    state = state_of(path)
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
    try:
        with foreign_names_refused(path):
            loaded = dist_checkpointing.load(_sharded(engine, loading=True), str(path))
    except UserError:
        raise
    except FAILURES as error:
        fault = TorchDistReader(path).cut_short()
        fix = "it is damaged" if fault else "resume with the config it was written with, or give another run.dir"
        raise UserError(f"checkpoint {str(path)!r} cannot be loaded ({fault or _cause(error)}); {fix}") from error
    for i, chunk in enumerate(engine.model.bare):
        wrong = chunk.load_state_dict(loaded[_key(engine, i)], strict=False)
        missing = [name for name in [*wrong.missing_keys, *wrong.unexpected_keys] if "_extra_state" not in name]
        if missing:
            raise UserError(f"checkpoint {str(path)!r} does not fit this model: {missing[0]!r}; give another run.dir")
    restore_state(engine.optimizer, loaded["optimizer"], schedule["num_steps"])
    engine.scheduler.load_state_dict(schedule)


def _key(engine: Engine, chunk: int) -> str:
    return "model" if len(engine.model.bare) == 1 else f"model{chunk}"


def _sharded(engine: Engine, loading: bool) -> dict[str, Any]:
    metadata = {
        # a key for every layer, in dense models too: what megarl.weights.files.megatron_folder reads
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    sharded: dict[str, Any] = {}
    for i, chunk in enumerate(engine.model.bare):
        tensors = chunk.sharded_state_dict(metadata=metadata)
        # Transformer Engine's _extra_state is of float8 alone, and cut by layout
        sharded[_key(engine, i)] = {name: tensor for name, tensor in tensors.items() if "_extra_state" not in name}
    sharded["optimizer"] = sharded_state(engine.optimizer, sharded, loading=loading)
    return sharded
