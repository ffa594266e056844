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
from vllm.utils.nccl import unpinned_nccl_env

from megarl.server.partial import partial_tensor
from megarl.server.vllm_reload import (
    ReloadPlan,
    abandon_reload,
    fingerprint,
    fingerprint_of_folder,
    reload_folder,
)
from megarl.weights.reshard.bit_sums import BitSums, HeldCheck
from megarl.weights.reshard.manifest import manifest_from
from megarl.weights.reshard.pack import Corrupted, assemble, message_bytes
from megarl.weights.transport.groups import WeightGroup
from megarl.weights.transport.receive import receive
from megarl.weights.transport.shared import SharedGroup


@dataclass
class SyncInit(WeightTransferInitInfo):
    """Where the senders wait: the run's store, the name of the group in
    it, this server's first rank in it; and what they will send.

    manifest_inputs: what a worker computes its manifest from (megarl.weights.reshard.manifest). agreeing: see
    HeldCheck; None where this is the first sync of the run.
    """

    store_host: str
    store_port: int
    group: str
    world_size: int
    senders: int
    rank_offset: int
    timeout_s: float
    transport: str  # reshard | broadcast
    staged: bool
    shared: bool  # the senders are on this node's GPUs: megarl.weights.transport.shared
    manifest_inputs: dict[str, Any]
    agreeing: list[str] | None = None


@dataclass
class SyncUpdate(WeightTransferUpdateInfo):
    """An update names nothing: the manifest has said what comes."""


class WeightReceiver(WeightTransferEngine[SyncInit, SyncUpdate]):
    """Slices under their Hugging Face names; vLLM's loader takes its shard out of them."""

    init_info_cls = SyncInit
    update_info_cls = SyncUpdate
    _group: WeightGroup | SharedGroup | None = None
    _loading = False  # stays set when a load fails: vLLM's layers are then half old, half new
    _begun = False  # whether a load ever began
    _disk: dict[str, str] | None = None  # digests of what vLLM loaded at its start
    _held_check: HeldCheck | None = None
    _broadcast = False
    _plan: ReloadPlan | None = None  # of the last whole load

    def init_transfer_engine(self, init_info: SyncInit) -> None:
        self.shutdown()
        parallel = self.vllm_config.parallel_config
        local = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.rank = init_info.rank_offset + local
        timeout = timedelta(seconds=init_info.timeout_s)
        store = dist.TCPStore(init_info.store_host, init_info.store_port, is_master=False, timeout=timeout)
        kind = SharedGroup if init_info.shared else WeightGroup
        device = torch.device(self.device)
        with unpinned_nccl_env():  # the trainers lack what vLLM pins (rollout.batch_invariant), and NCCL hangs then
            self._group = kind(store, init_info.group, self.rank, init_info.world_size, init_info.timeout_s, device)
        self._manifest = manifest_from(init_info.manifest_inputs, self.rank - init_info.senders)
        broadcast = init_info.transport == "broadcast"
        if broadcast != self._broadcast:
            self._held_check = None  # whole tensors arrive then, where a rank holds its part of them
        if self._held_check is None and init_info.agreeing is not None:
            self._held_check = HeldCheck(init_info.agreeing)
        self._broadcast, self.staged = broadcast, init_info.staged
        self._staging: list[list[Tensor]] = []  # buffers: allocated once, a copy of what this worker holds
        self._staged: dict[str, Tensor] | None = None

    def remember_disk(self) -> None:
        """Notes the digests of what vLLM loaded from disk, for check(). Does nothing once an update has begun."""
        if not self._begun:
            self._disk = fingerprint(self.model)

    @property
    def remembers(self) -> bool:
        """Whether the digests of what vLLM loaded from disk were taken before the first update."""
        return self._disk is not None

    def check(self, folder: str | None) -> list[str]:
        """Names of the weights here whose digest is not that of an engine
        loaded from `folder`; None is the folder vLLM started with.
        """
        if folder is None and self._disk is None:
            raise RuntimeError("the digests of the weights vLLM started with were not taken before the first update")
        actual = fingerprint(self.model)
        expected = self._disk if folder is None else self._fingerprint_of(folder)
        assert expected is not None
        return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))

    def _fingerprint_of(self, folder: str) -> dict[str, str]:
        """Of a second model beside the one that serves, where there is room for a copy (sync.staged); else of this one,
        filled again from the folder: where that changes a byte, the run ends.
        """
        if self.staged:
            return fingerprint_of_folder(self.vllm_config, folder)
        if self._loading:
            abandon_reload(self.model)
        self._loading = True
        reload_folder(self.vllm_config, self.model, folder)
        self._loading = False
        return fingerprint(self.model)

    def stage(self) -> None:
        """Receives and checks everything; what serves is not touched.
        Raises Corrupted, or RuntimeError where a sender is gone.
        """
        self._staged = None
        self._received = BitSums(self.model_config.dtype)
        staged: dict[str, Tensor] = {}
        if not self._staging:
            self._staging = [self._buffers(number) for number in range(len(self._manifest.buckets))]
        for tensors in self._receive(self._staging):
            self._received.add(tensors.items())
            staged |= tensors
        self._staged = staged

    def start_weight_update(self) -> None:
        if self._loading:
            abandon_reload(self.model)
            self._plan = None
        self._loading = self._begun = True
        initialize_layerwise_reload(self.model)
        shards = self._manifest.shards
        if self._plan is None or not self._plan.fits(self.model, shards):
            self._plan = ReloadPlan(self.model, shards) if self.vllm_config.quant_config is None else None
        if self._plan is not None:
            self._plan.begin()

    def receive_weights(self, update_info: SyncUpdate) -> None:
        """Loads what was staged, or receives, checks and loads bucket by bucket."""
        if self.staged:
            if self._staged is None:
                raise RuntimeError("nothing was staged: receive first")
            self._load(self._staged)
            self._staged = None
        else:
            self._received = BitSums(self.model_config.dtype)
            for tensors in self._receive(None):
                self._received.add(tensors.items())
                self._load(tensors)

    def finish_weight_update(self) -> None:
        if self._plan is not None:
            self._plan.end()
        finalize_layerwise_reload(self.model, self.model_config)
        self._compare_held()
        self._loading = False

    def _compare_held(self) -> None:
        """RuntimeError where the model holds other numbers than it received."""
        held = BitSums(self.model_config.dtype)
        for pair in self.model.named_parameters():  # one by one: together they would be copied, a layer at a time
            held.add([pair])
        self._held_check = self._held_check or HeldCheck()
        if parts := self._held_check.wrong(self._received.numbers(), held.numbers()):
            raise RuntimeError(
                f"weight sync: rollout rank {self.rank} does not hold what it received: {len(parts)} parts differ, "
                f"first {', '.join(parts[:3])}"
            )

    @property
    def agreeing(self) -> list[str]:
        """Parts of the model that are seen to hold what they received; after a first sync."""
        return sorted(self._held_check.agreeing or ()) if self._held_check else []

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _load(self, tensors: dict[str, Tensor]) -> None:
        shards = self._manifest.shards
        parts = {
            name: partial_tensor(tensor, shards[name].rect, shards[name].shape, name)
            for name, tensor in tensors.items()
        }
        if self._plan is None:
            self.model.load_weights(iter(parts.items()))
        else:
            self._plan.load(parts)

    def _receive(self, staging: list[list[Tensor]] | None) -> Iterator[dict[str, Tensor]]:
        """The tensors of one bucket after the other; the next bucket is
        on its way meanwhile. A failure leaves the group.
        """
        if self._group is None:
            raise RuntimeError("weights were sent before the group was made: call init first")
        try:
            buckets = self._manifest.buckets
            sources = [[None if self._broadcast else message.source for message in bucket] for bucket in buckets]
            make = self._buffers if staging is None else staging.__getitem__
            for bucket, buffers in zip(buckets, receive(self._group, sources, make), strict=True):
                yield assemble(bucket, buffers, self._manifest)
        except Corrupted as error:
            self.shutdown()
            raise RuntimeError(f"weight sync: {error} (rollout rank {self.rank})") from None
        except BaseException:
            self.shutdown()  # whoever sends to this rank learns of it at once
            raise

    def _buffers(self, number: int) -> list[Tensor]:
        bucket = self._manifest.buckets[number]
        sizes = [message_bytes(message.slices, self._manifest.dtypes) for message in bucket]
        return [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
