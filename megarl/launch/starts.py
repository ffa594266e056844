"""How often torchrun has started this rank, and whether it will again."""

from __future__ import annotations

import os

from megarl.errors import UserError


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
