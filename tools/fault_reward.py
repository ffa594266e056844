"""The reward of the runs that faults are injected into: it differs within every group, and leaves the cores to those
that are started again.
"""

from __future__ import annotations

import time

WAIT_S = 0.1


def patient(response: str) -> float:
    """The share of digits."""
    time.sleep(WAIT_S)
    return sum(character.isdigit() for character in response) / max(len(response), 1)
