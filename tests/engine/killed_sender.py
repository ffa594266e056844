"""Run by test_weight_sync.py: a trainer that is killed in the middle of a weight sync:
PHASE STORE_PORT WORKER CHECKPOINT.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from megarl.rollout.registry import from_known, open_store
from tests.engine.support import Pusher


def main(phase: str, port: str, worker: str, checkpoint: str) -> None:
    weights = load_file(Path(checkpoint) / "model.safetensors")
    store = open_store("127.0.0.1", int(port), is_master=False, timeout_s=10)
    pusher = Pusher(store, int(port), [from_known(json.loads(worker))], 30, staged=True)
    pusher.connect(weights)
    pusher.load(weights if phase == "commit" else _Doomed(weights))
    os.kill(os.getpid(), signal.SIGKILL)


class _Doomed(dict[str, Tensor]):
    """Whoever reads these weights does not live to see the last of them."""

    def items(self) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        for number, item in enumerate(super().items()):
            if number == len(self) - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


if __name__ == "__main__":
    main(*sys.argv[1:])
