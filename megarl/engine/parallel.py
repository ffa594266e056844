"""Process groups: torch.distributed from torchrun's environment, then megatron-core's groups in our layout."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megarl.addresses import listen_at
from megarl.checkpoints import whole_checkpoints
from megarl.config import Config, ParallelConfig
from megarl.engine.device import Device
from megarl.engine.megatron_compat import groups_of_layout
from megarl.launch.peers import connecting
from megarl.launch.starts import start_number
from megarl.rollout.patience import longest_wait_s, reading_s, resuming_s
from megarl.weights.map.layout import Coord, Layout

GROUP_TIMEOUT = timedelta(minutes=30)  # at least
MARGIN = timedelta(minutes=10)
_host: tuple[Any, Any] = (None, None)  # the default group, and the gloo group beside it


@dataclass(frozen=True)
class Parallel:
    """This rank's place, and the groups that code outside megatron-core needs."""

    layout: Layout
    coord: Coord
    device: Device
    host_group: dist.ProcessGroup | None = None  # of all ranks, for what lies in host memory; None is the default group
    timeout: timedelta = GROUP_TIMEOUT  # of every operation of every group

    @property
    def is_main(self) -> bool:
        return self.coord.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coord.pp == self.layout.pp - 1

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def etp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_expert_tensor_parallel_group()

    @property
    def cp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_context_parallel_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks at the same place of the other replicas."""
        return parallel_state.get_data_parallel_group()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """Data- and context-parallel ranks: those that hold the same dense parameters."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def ingest_rank(self, dp: int) -> int:
        return self.layout.rank_of(tp=0, cp=0, dp=dp, pp=0)

    @property
    def is_ingest(self) -> bool:
        return self.coord.rank == self.ingest_rank(self.coord.dp)


def group_timeout(config: Config) -> timedelta:
    """For a rank that waits in a group for another: longer than any wait of that one for the rollout workers, who read
    an export of the model among others, and for a checkpoint to resume from, and than it takes to name a stall, whose
    line says more.
    """
    rollout, launch = config.rollout, config.launch
    checked_s = config.sync.timeout_s + reading_s(Path(config.model.path))
    ranks, whole = int(os.environ.get("WORLD_SIZE", "1")), whole_checkpoints(Path(config.run.dir) / "checkpoints")
    resumed_s = resuming_s(whole[-1], ranks) if whole else 0.0
    longest = max(
        longest_wait_s(rollout.request_timeout_s), 2 * rollout.start_timeout_s, checked_s, resumed_s, launch.stall_s
    )
    return max(GROUP_TIMEOUT, timedelta(seconds=longest) + MARGIN)


def init_parallel(config: ParallelConfig, device: Device, seed: int, timeout: timedelta = GROUP_TIMEOUT) -> Parallel:
    """Joins the process group and makes megatron-core's groups. Outside torchrun this is a world of one rank.

    timeout: of every operation of every group.
    """
    if dist.is_initialized():  # a process may build several models one after the other, in layouts of their own
        _leave_groups()
        host_group = _host_group(device, timeout)
    else:
        with connecting():  # NCCL's default group connects nobody: under it the first that does is the host's
            if "RANK" in os.environ:
                _join_torchrun(device.backend, timeout)
            else:
                port = (listening := listen_at("127.0.0.1", 0)).getsockname()[1]
                store = dist.TCPStore("127.0.0.1", port, 1, is_master=True, master_listen_fd=listening.detach())
                dist.init_process_group(device.backend, store=store, rank=0, world_size=1, timeout=timeout)
            host_group = _host_group(device, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
        context_parallel_size=config.cp,
        expert_model_parallel_size=config.ep,
        expert_tensor_parallel_size=config.etp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    torch.manual_seed(seed)
    # On a CPU the tracker of inference forks no CUDA generator; there is no dropout whose generator it would have to
    # keep.
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=device.device.type == "cpu")
    layout = Layout(**config.model_dump(), world=dist.get_world_size())
    return Parallel(layout, layout.coord(dist.get_rank()), device, host_group, timeout)


def _host_group(device: Device, timeout: timedelta) -> dist.ProcessGroup | None:
    """NCCL takes no host memory. Made once for a default group. Collective."""
    global _host
    if device.backend == "gloo":
        return None
    if _host[0] is not dist.group.WORLD:
        _host = dist.group.WORLD, dist.new_group(backend="gloo", timeout=timeout)
    return _host[1]


def _join_torchrun(backend: str, timeout: timedelta) -> None:
    """By torchrun's environment. Its static rendezvous keeps one store for all its restarts: each start has names of
    its own in it, or ranks would look for each other where those before them were.
    """
    starts = start_number()
    if not starts or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    whole = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.PrefixStore(f"start_{starts}", whole)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def destroy_parallel() -> None:
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _leave_groups() -> None:
    """megatron-core only forgets its groups: each would keep threads that wake up a hundred times a second (gloo's
    loop). Collective.
    """
    groups = groups_of_layout()
    parallel_state.destroy_model_parallel()
    hosts = _host[1] if _host[0] is dist.group.WORLD else None
    dist.barrier(group=hosts)  # nobody is in a group that another rank closes
    for group in groups:
        dist.destroy_process_group(group)
