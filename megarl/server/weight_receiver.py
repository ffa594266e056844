"""The receiving end of a weight sync, inside each vLLM worker: our backend in vLLM's weight-transfer registry.

stage() receives, checks and keeps a whole sync while the old weights serve; vLLM's start, update, finish then load it.
Unstaged, update receives and loads bucket by bucket. A load that failed half way is mended by the next whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megarl.server.partial import partial_tensor
from megarl.server.vllm_reload import abandon_reload, fingerprint, fingerprint_of_folder
from megarl.weights.reshard.pack import Corrupted, Manifest, Message, assemble, message_bytes
from megarl.weights.transport.groups import WeightGroup, Work
from megarl.weights.transport.shared import SharedGroup


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the senders wait: the run's store, the name of the group in
    it, this server's first rank in it; and what they will send.

    manifests: one for each worker of this server, or one for all (megarl.weights.reshard.pack.Manifest).
    """

    store_host: str
    store_port: int
    group: str
    world_size: int
    rank_offset: int
    timeout_s: float
    transport: str  # reshard | broadcast
    staged: bool
    shared: bool  # the senders are on this node's GPUs: megarl.weights.transport.shared
    manifests: list[dict[str, Any]]


@dataclass
class Everything(WeightTransferUpdateInfo):
    """An update names nothing: the manifest has said what comes."""


class WeightReceiver(WeightTransferEngine[Meeting, Everything]):
    """Slices under their Hugging Face names; vLLM's loader takes its shard out of them."""

    init_info_cls = Meeting
    update_info_cls = Everything
    _group: WeightGroup | SharedGroup | None = None
    _loading = False  # stays set when a load fails: vLLM's layers are then half old, half new
    _begun = False  # whether a load ever began
    _disk: dict[str, str] | None = None  # digests of what vLLM loaded at its start

    def init_transfer_engine(self, init_info: Meeting) -> None:
        self.shutdown()
        parallel = self.vllm_config.parallel_config
        local = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.rank = init_info.rank_offset + local
        timeout = timedelta(seconds=init_info.timeout_s)
        store = dist.TCPStore(init_info.store_host, init_info.store_port, is_master=False, timeout=timeout)
        kind = SharedGroup if init_info.shared else WeightGroup
        self._group = kind(
            store, init_info.group, self.rank, init_info.world_size, init_info.timeout_s, torch.device(self.device)
        )
        self._manifest = Manifest.from_json(init_info.manifests[local if len(init_info.manifests) > 1 else 0])
        self._broadcast, self.staged = init_info.transport == "broadcast", init_info.staged
        self._kept: list[list[Tensor]] = []  # the staging buffers: allocated once, a copy of what this worker holds
        self._staged: dict[str, Tensor] | None = None

    def remember_disk(self) -> None:
        """Notes the digests of what vLLM loaded from disk, for check(). Does nothing once an update has begun."""
        if not self._begun:
            self._disk = fingerprint(self.model)

    def check(self, folder: str | None) -> list[str]:
        """Names of the weights here whose digest is not that of an engine
        loaded from `folder`; None is the folder vLLM started with.
        """
        expected = self._disk if folder is None else fingerprint_of_folder(self.vllm_config, folder)
        if expected is None:
            raise RuntimeError("the digests of the weights vLLM started with were not taken before the first update")
        found = fingerprint(self.model)
        return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))

    def stage(self) -> None:
        """Receives and checks everything; what serves is not touched.
        Raises Corrupted, or RuntimeError where a sender is gone.
        """
        self._staged = None
        staged: dict[str, Tensor] = {}
        if not self._kept:
            self._kept = [self._buffers(bucket) for bucket in self._manifest.buckets]
        for tensors in self._receive(self._kept):
            staged |= tensors
        self._staged = staged

    def start_weight_update(self) -> None:
        if self._loading:
            abandon_reload(self.model)
        self._loading = self._begun = True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Everything) -> None:
        """Loads what was staged, or receives, checks and loads bucket by bucket."""
        if self.staged:
            if self._staged is None:
                raise RuntimeError("nothing was staged: receive first")
            self._load(self._staged)
            self._staged = None
        else:
            for tensors in self._receive(None):
                self._load(tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._loading = False

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _load(self, tensors: dict[str, Tensor]) -> None:
        held = self._manifest.tensors
        self.model.load_weights(
            (name, partial_tensor(tensors[name], held[name].start, held[name].full, name))
            for name in held
            if name in tensors
        )

    def _receive(self, kept: list[list[Tensor]] | None) -> Iterator[dict[str, Tensor]]:
        """The tensors of one bucket after the other; the next bucket is
        on its way meanwhile. A failure leaves the group.
        """
        if self._group is None:
            raise RuntimeError("weights were sent before the group was made: call init first")
        try:
            buckets = self._manifest.buckets
            ahead = self._begin(0, kept)
            for number, bucket in enumerate(buckets):
                buffers, works = ahead
                if number + 1 < len(buckets):
                    ahead = self._begin(number + 1, kept)
                for work in works:
                    work.wait()
                yield assemble(bucket, buffers, self._manifest.tensors)
        except Corrupted as error:
            self.shutdown()
            raise RuntimeError(f"weight sync: {error} (rollout rank {self.rank})") from None
        except BaseException:
            self.shutdown()  # whoever sends to this rank learns of it at once
            raise

    def _begin(self, number: int, kept: list[list[Tensor]] | None) -> tuple[list[Tensor], list[Work]]:
        assert self._group is not None
        bucket = self._manifest.buckets[number]
        buffers = kept[number] if kept is not None else self._buffers(bucket)
        if self._broadcast:
            return buffers, [self._group.broadcast(buffer) for buffer in buffers]
        return buffers, [
            *self._group.exchange(
                [], [(buffer, message.source) for buffer, message in zip(buffers, bucket, strict=True)], number
            )
        ]

    def _buffers(self, bucket: tuple[Message, ...]) -> list[Tensor]:
        sizes = [message_bytes(message.parts, self._manifest.tensors) for message in bucket]
        return [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
