"""Whether a checkpoint is what was written, asked by all ranks together: each reads its share of the files."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megarl.checkpoints import STATE, damage
from megarl.errors import UserError


def damage_on_any_rank(checkpoint: Path, hosts: dist.ProcessGroup | None) -> str | None:
    """As megarl.checkpoints.damage, contents included; the same on every rank. Collective.

    hosts: of all ranks, for host memory; None is the default group.
    """
    share = dist.get_rank(), dist.get_world_size()
    everyone: list[str | None] = [None] * share[1]
    dist.all_gather_object(everyone, damage(checkpoint, contents=True, share=share), group=hosts)
    return next(filter(None, everyone), None)


def check_source(path: Path, hosts: dist.ProcessGroup | None) -> None:
    """UserError where model.path is a run's checkpoint that is damaged. Collective."""
    if (path / STATE).is_file() and (fault := damage_on_any_rank(path, hosts)):
        raise UserError(f"model.path {str(path)!r} is damaged ({fault}); copy the checkpoint again, or give another")
