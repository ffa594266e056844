"""Which checkpoint a run goes on from: rank 0 decides, every rank looks at its share, and all know before any loads."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megarl.checkpoints import SEEN_WITHIN_S, no_sound, remove_leftovers, whole_checkpoints
from megarl.engine.checkpoint import load_checkpoint
from megarl.engine.soundness import damage_on_any_rank
from megarl.engine.step import Engine
from megarl.errors import UserError
from megarl.observe.trace import enter
from megarl.rollout.patience import resuming_s

Hosts = dist.ProcessGroup | None  # of all ranks, for host memory; None is the default group


def resume(run_dir: Path, engine: Engine, critic: Engine | None = None) -> dict[str, Any] | None:
    """Fills the engines from the newest sound checkpoint; returns its state, None where the run begins. Collective."""
    hosts = engine.model.parallel.host_group
    check_shared(run_dir, hosts)
    path = agree(run_dir / "checkpoints", hosts)
    if path is None:
        return None
    enter(f"the load of {path.name}", resuming_s(path, dist.get_world_size()))
    return load_checkpoint(engine, path, critic)


def check_shared(run_dir: Path, hosts: Hosts = None) -> None:
    """UserError where run.dir is not one folder for all ranks: each writes its part of checkpoints there."""
    rank, names = dist.get_rank(), [f".seen_{uuid.uuid4().hex}"]
    dist.broadcast_object_list(names, src=0, group=hosts)
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / names[0]).touch()
    dist.barrier(group=hosts)
    try:
        _all_see(run_dir, names[0], hosts)
    finally:
        if rank == 0:
            (run_dir / names[0]).unlink()


def _all_see(folder: Path, name: str, hosts: Hosts) -> None:
    """UserError, on every rank, where one does not see what rank 0 sees in `folder`, a run.dir or below it."""
    until = time.monotonic() + SEEN_WITHIN_S
    while not (seen := _lists(folder, name)) and time.monotonic() < until:
        time.sleep(0.2)
    everyone: list[tuple[bool, str]] = [(False, "")] * dist.get_world_size()
    dist.all_gather_object(everyone, (seen, socket.gethostname()), group=hosts)
    for other, (sees, host) in enumerate(everyone):
        if not sees:
            raise UserError(
                f"run.dir {str(folder)!r} is not the same folder for all ranks: rank {other} (host {host}) does not "
                f"see {name}, which rank 0 (host {everyone[0][1]}) sees there; give a folder that all hosts share"
            )


def _lists(folder: Path, name: str) -> bool:
    """Asks for the folder's list, which file systems renew sooner than the absence of a name."""
    try:
        return name in os.listdir(folder)
    except OSError:
        return False


def agree(folder: Path, hosts: Hosts = None) -> Path | None:
    """The newest checkpoint whose files are what was written, checksums included; None where there is none. Collective.

    Newer ones that are damaged are named and set aside, as step_N.damaged: the run writes those steps again. UserError
    where all are damaged.
    """
    rank = dist.get_rank()
    names: list[list[str]] = [[]]
    if rank == 0:
        remove_leftovers(folder)
        names = [[path.name for path in reversed(whole_checkpoints(folder))]]
    dist.broadcast_object_list(names, src=0, group=hosts)
    faults: dict[str, str] = {}
    for name in names[0]:
        _all_see(folder, name, hosts)
        enter(f"the checksums of {name}", resuming_s(folder / name, dist.get_world_size()))
        fault = damage_on_any_rank(folder / name, hosts)
        if fault is None:
            if rank == 0:
                _set_aside(folder, faults, name)
            return folder / name
        faults[name] = fault
    if faults:
        name, fault = next(iter(faults.items()))
        raise UserError(no_sound(folder / name, fault))
    return None


def _set_aside(folder: Path, faults: dict[str, str], sound: str) -> None:
    for name, fault in faults.items():
        aside = folder / f"{name}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / name).rename(aside)
        print(f"checkpoint {str(folder / name)!r} is damaged ({fault}): it is now {aside.name}; going on from {sound}")
