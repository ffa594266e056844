"""The memory that only training needs: optimizer state goes to host
memory and comes back bitwise, gradient buffers go and come as zeros.

Storages are emptied and filled again in place, so every view of them (a parameter's main_grad, a shard of the
optimizer) stays what it is.
megatron-core's own offload_to_cpu gives tensors other memory instead, which would part a float32 parameter from the
model it belongs to.
Weights stay: a weight sync and the canary need them while the rollouts have the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, UntypedStorage

from megarl.engine.adam_state import parts_of
from megarl.engine.step import Engine


class TrainingMemory:
    """Of several engines (a policy, a critic). release() and restore() in turn; between them nothing may train."""

    def __init__(self, engines: list[Engine]) -> None:
        self._engines = engines
        self._cuda = engines[0].model.parallel.device.device.type == "cuda"
        self._host: dict[int, Tensor] = {}  # by storage; kept from one time to the next: pinned memory is slow to get
        self._sizes: list[tuple[UntypedStorage, int]] = []  # of what is released now

    def release(self) -> None:
        """After a step: what the gradient buffers hold then has been used."""
        assert not self._sizes, "released already"
        storages, host = self._optimizer_storages(), {}
        for storage in storages:
            host_copy = self._host.get(_key(storage))
            if host_copy is None or host_copy.numel() != storage.nbytes():
                host_copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._cuda)
            host[_key(storage)] = host_copy.copy_(_bytes(storage), non_blocking=True)
        self._host = host
        self._synchronize()
        for storage in [*storages, *self._gradient_storages()]:
            self._sizes.append((storage, storage.nbytes()))
            storage.resize_(0)
        torch.cuda.empty_cache()  # the rollout engine is another process

    def restore(self) -> None:
        for storage, size in self._sizes:
            storage.resize_(size)
            if (host_copy := self._host.get(_key(storage))) is not None:
                _bytes(storage).copy_(host_copy, non_blocking=True)
            else:
                _bytes(storage).zero_()
        self._sizes = []
        self._synchronize()

    def _optimizer_storages(self) -> list[UntypedStorage]:
        """Of master weights and Adam's moments, unless they are the
        model's own (a float32 parameter is its own master weight).
        """
        models = {_key(tensor.untyped_storage()) for engine in self._engines for _, tensor in engine.model.params()}
        tensors = [
            tensor for engine in self._engines for tensor in _optimizer_tensors(engine) if tensor.is_cuda == self._cuda
        ]
        storages = {_key(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
        return [storage for key, storage in storages.items() if key not in models]

    def _gradient_storages(self) -> list[UntypedStorage]:
        chunks = [chunk for engine in self._engines for chunk in engine.model.chunks]
        return [
            buffer.grad_data.untyped_storage()
            for chunk in chunks
            for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ]

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def _optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    for part in parts_of(engine.optimizer):
        if (inner := getattr(part, "optimizer", None)) is None:  # a rank without parameters of this kind
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def _key(storage: UntypedStorage) -> int:
    return storage._cdata  # the address of torch's own object: the same for every view


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
