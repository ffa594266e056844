"""How often torchrun has started this rank, and whether it will again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megarl.door import signed, verified
from megarl.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

NEWEST = "newest"


def start_number() -> int:
    """0 of a node's first start."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_over(error: BaseException | None, gave_up: bool) -> bool:
    """Whether nobody starts the trainers of a run again that ends so: gave_up, or by an error.

    torchrun starts whatever fails again, as often as --max-restarts says; that of `megarl run` never does. `megarl run`
    itself does so for all that is no UserError (local.Restarts), and ends the workers where it does not.
    """
    if error is None and not gave_up:
        return True
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - start_number()
    return left <= 0 and (gave_up or isinstance(error, UserError))


def keep_up(store: dist.Store, mine: int) -> None:
    """For a rank that waits for those of other nodes, now and then. UserError where they were started more often.

    Under torchrun's static rendezvous each node counts its own starts. A rank that ends before it has met the others is
    known to its own node alone, whose next start would wait for ranks that wait for the one before.
    """
    told = verified(NEWEST, store.get(NEWEST)) if store.check([NEWEST]) else None
    newest = int(told) if told else -1
    if newest > mine:
        raise UserError(
            f"the trainer ranks of another host were started again (restart {newest}, here {mine}): these end, so that "
            "torchrun starts them with those"
        )
    if newest < mine:
        store.set(NEWEST, signed(NEWEST, str(mine)))  # again the next time, where a lower one came after it
