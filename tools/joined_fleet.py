"""A run's workers as a tool joins them."""

from __future__ import annotations

from megarl.addresses import host_and_port
from megarl.config import Config
from megarl.engine.parallel import Parallel
from megarl.rollout.fleet import Fleet
from megarl.rollout.registry import WorkerInfo, open_store


class JoinedFleet(Fleet):
    """Workers that belong to somebody else, who is the store's master:
    for tools that sync from one set of ranks after another.
    """

    def __init__(self, config: Config, parallel: Parallel, workers: list[WorkerInfo]) -> None:
        host, port = host_and_port(config.launch.store)
        self._store = open_store(host, port, is_master=False, timeout_s=config.sync.timeout_s)
        self._device, self._hosts, self._address = parallel.device.device, parallel.host_group, (host, port)
        self.workers = self.members = workers

    def close(self, run_is_over: bool = False) -> None:
        """Lets go of the workers, which go on."""
        self._leave_group()
