"""The reference model of the KL term: the weights a run started from,
kept beside the live ones and swapped in for a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megarl.engine.model import Model


class Reference:
    """A copy, in host memory, of this rank's shards as they are now;
    made before a checkpoint is loaded, it is that of model.path.

    It costs the host one model and no device memory: a swap exchanges
    the two tensor by tensor, and swapping back is bitwise.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        pin = model.parallel.device.device.type == "cuda"  # not yet run
        self._stored = [_host_copy(tensor, pin) for _, tensor in model.params()]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model has the reference's weights. Nothing may train or send them meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """In the device's order: the host waits for none of the copies, and looks at none of what is stored."""
        for stored, (_, tensor) in zip(self._stored, self._model.params(), strict=True):
            live = tensor.detach().clone()
            tensor.copy_(stored, non_blocking=True)
            stored.copy_(live, non_blocking=True)


def _host_copy(tensor: torch.Tensor, pin: bool) -> torch.Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    return copy.pin_memory() if pin else copy
