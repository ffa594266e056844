"""Trainer and rollouts on the same GPUs (launch.colocate): the two take turns with the memory.

Outside training() the rollout servers are awake and Megatron's optimizer and gradients are not on the device; inside,
the servers sleep,
their weights in host memory and their KV cache gone. The trainer's weights are always there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megarl.config import Config
from megarl.engine.offload import TrainingMemory
from megarl.engine.step import Engine
from megarl.observe.trace import phase
from megarl.rollout.fleet import Fleet


class MemoryTurns:
    """Made once the engines hold what they start from, before the
    servers are waited for; does nothing without launch.colocate.
    """

    def __init__(self, config: Config, engines: list[Engine]) -> None:
        self._memory = TrainingMemory(engines) if config.launch.colocate else None
        if self._memory:
            self._memory.release()

    @contextmanager
    def training(self, fleet: Fleet) -> Iterator[None]:
        """Collective. What reads or changes the optimizer's state happens inside. After a failure nothing is given
        back: the run ends.
        """
        if self._memory is None:
            yield
            return
        with phase("to_training"):
            fleet.turn("sleep")
            self._memory.restore()
        yield
        with phase("to_rollout"):
            self._memory.release()
            fleet.turn("wake")
