"""The group that weights travel by where trainer and workers share GPUs
(launch.colocate): messages in memory that both ends see.

NCCL takes no two ranks on one GPU. Here a message is a handle (megarl/weights/transport/ipc.py)
in the run's store; the receiver copies out of the sender's buffer and says so. One node, and on
a CPU shared memory, which is what tests run; on a GPU CUDA IPC (docs/gpu.md).
Keys, under weights/NAME/: here/RANK; SOURCE/DESTINATION/NUMBER and the same with /taken; gone (a rank that left).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.weights.transport.groups import SENDER
from megarl.weights.transport.ipc import cut, open_whole, share

POLL_S = 0.0002  # between two looks for a key
LOOKS = 100  # of which one looks whether a rank has left
# storages of one sender that its reader keeps open: its ring of buffers. One that is open stays allocated at the
# sender.
OPEN = 2


class SharedGroup:
    """What megarl.weights.transport.groups.WeightGroup offers, and its failures: RuntimeError when a message is not
    there within `timeout_s`.
    """

    def __init__(
        self, store: dist.Store, name: str, rank: int, world_size: int, timeout_s: float, device: torch.device
    ) -> None:
        self._store = dist.PrefixStore(f"weights/{name}", store)
        self._rank, self._world, self._timeout_s, self._device = rank, world_size, timeout_s, device
        self._sent, self._taken = [0] * world_size, [0] * world_size  # messages to and from each rank
        # storages by sender, the one used last at the end
        self._open: defaultdict[str, OrderedDict[str, Tensor]] = defaultdict(OrderedDict)
        self._closed = False
        self._store.set(f"here/{rank}", "1")
        for other in range(world_size):
            self.wait(f"here/{other}", other)

    def broadcast(self, buffer: Tensor) -> _Works:
        """Starts to send (rank 0) or receive (the others) a contiguous uint8 buffer."""
        if self._rank == SENDER:
            return _Works([self._send(buffer, rank) for rank in range(self._world) if rank != SENDER])
        return _Works([self._receive(buffer, SENDER)])

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], tag: int
    ) -> list[_Works]:
        """Starts to send contiguous uint8 buffers to ranks and to fill
        others from ranks; messages between two ranks arrive in order.
        """
        works = [self._send(buffer, rank) for buffer, rank in sends] + [
            self._receive(buffer, rank) for buffer, rank in receives
        ]
        return [_Works(works)] if works else []

    def close(self) -> None:
        """Leaves the group; what is pending fails, here and at the other end."""
        if not self._closed:
            with contextlib.suppress(RuntimeError):  # the store may be gone too, and with it everybody
                if not self._store.check(["gone"]):  # who leaves because another has left is not the one to name
                    self._store.set("gone", str(self._rank))
            self._closed = True  # only now: a thread that sends lets go of its buffers then, which others may open
            self._open.clear()

    def _send(self, buffer: Tensor, rank: int) -> _Sent:
        self._synchronize()  # what fills the buffer
        key = f"{self._rank}/{rank}/{self._sent[rank]}"
        self._sent[rank] += 1
        self._store.set(key, json.dumps(share(buffer)))
        return _Sent(self, key, rank, buffer)

    def _receive(self, buffer: Tensor, rank: int) -> _Received:
        key = f"{rank}/{self._rank}/{self._taken[rank]}"
        self._taken[rank] += 1
        return _Received(self, key, rank, buffer)

    def take(self, key: str, source: int, buffer: Tensor) -> None:
        """Copies the message `key` of rank `source` into `buffer`."""
        self.wait(key, source)
        handle = json.loads(self._store.get(key))
        storages, storage = self._open[key.partition("/")[0]], json.dumps(handle["parts"])
        if storage not in storages:
            if len(storages) == OPEN:
                storages.popitem(last=False)
            try:
                storages[storage] = open_whole(handle, self._device)
            except RuntimeError:  # its owner has let go of it
                self._refuse_if_left(source)
                raise
        storages.move_to_end(storage)
        buffer.copy_(cut(storages[storage], handle))
        self._synchronize()
        self._store.set(f"{key}/taken", "1")

    def forget(self, key: str, reader: int) -> None:
        """Waits until rank `reader` has taken a message, and clears it away."""
        self.wait(f"{key}/taken", reader)
        self._store.delete_key(key)
        self._store.delete_key(f"{key}/taken")

    def wait(self, key: str, other: int) -> None:
        """Looks for the key, which rank `other` writes, again and again: a blocking wait of torch's
        store would print a warning whenever it is interrupted.
        """
        deadline, look = time.monotonic() + self._timeout_s, 0
        while not self._store.check([key]):
            look += 1
            if self._closed:
                raise RuntimeError("the weight group was closed")
            if look % LOOKS == 0:
                self._refuse_if_left(other)
            if time.monotonic() > deadline:
                raise RuntimeError(f"weight group: nothing came from rank {other} within {self._timeout_s:g} s ({key})")
            time.sleep(POLL_S)

    def _refuse_if_left(self, other: int) -> None:
        """RuntimeError where a rank has left, while this one waits for `other`."""
        if self._store.check(["gone"]):
            gone = self._store.get("gone").decode()
            if gone == str(self._rank):
                raise RuntimeError("the weight group was closed")
            raise RuntimeError(f"rank {gone} of the weight group left it while this one waited for rank {other}")

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


@dataclass
class _Sent:
    group: SharedGroup
    key: str
    rank: int
    buffer: Tensor  # kept until it was taken

    def wait(self) -> None:
        self.group.forget(self.key, self.rank)


@dataclass
class _Received:
    group: SharedGroup
    key: str
    rank: int
    buffer: Tensor

    def wait(self) -> None:
        self.group.take(self.key, self.rank, self.buffer)


@dataclass
class _Works:
    works: Sequence[_Sent | _Received]

    def wait(self) -> None:
        for work in self.works:
            work.wait()
