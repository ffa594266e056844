"""The receiving end of a weight sync, inside each vLLM worker: our backend in vLLM's weight-transfer registry."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megarl.weights.hash import tensor_hash
from megarl.weights.pack import buffer_bytes, unpack
from megarl.weights.transport import WeightGroup


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the sender waits: the run's store, the name of the group in it, and this server's first rank in it."""

    store_host: str
    store_port: int
    group: str
    world_size: int
    rank_offset: int
    timeout_s: float


@dataclass
class BucketHeader(WeightTransferUpdateInfo):
    """The tensors of one bucket, in the order of its buffer (megarl.weights.pack)."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    hashes: list[str]


class WeightReceiver(WeightTransferEngine[Meeting, BucketHeader]):
    """Full tensors under their Hugging Face names, by broadcast from rank 0; vLLM's loader cuts out its shard."""

    init_info_cls = Meeting
    update_info_cls = BucketHeader
    _group: WeightGroup | None = None
    _updating = False  # stays set when an update fails: vLLM's layers are then half old, half new, and another update does not mend them

    def init_transfer_engine(self, init_info: Meeting) -> None:
        self.shutdown()
        parallel = self.vllm_config.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        timeout = timedelta(seconds=init_info.timeout_s)
        store = dist.TCPStore(init_info.store_host, init_info.store_port, is_master=False, timeout=timeout)
        self._group = WeightGroup(store, init_info.group, rank, init_info.world_size, init_info.timeout_s, torch.device(self.device))

    def start_weight_update(self) -> None:
        if self._updating:
            raise RuntimeError("an earlier weight update failed half way and the weights here are undefined: restart this rollout worker")
        self._updating = True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BucketHeader) -> None:
        """Raises RuntimeError, naming the tensor, where the received bytes are not the sent ones; nothing of that bucket is loaded then."""
        if self._group is None:
            raise RuntimeError("weights were sent before the group was made: call init first")
        buffer = torch.empty(buffer_bytes(update_info.dtypes, update_info.shapes), dtype=torch.uint8, device=self.device)
        self._group.broadcast(buffer).wait()
        tensors = list(unpack(buffer, update_info.names, update_info.dtypes, update_info.shapes))
        for (name, tensor), sent in zip(tensors, update_info.hashes):
            if (found := tensor_hash(tensor)) != sent:
                raise RuntimeError(f"weight sync: tensor {name!r} arrived with checksum {found}, was sent with {sent}")
        self.model.load_weights(iter(tensors))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._updating = False

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
