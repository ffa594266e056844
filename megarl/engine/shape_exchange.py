"""megarl's answer to a fault of megatron-core 0.16: the exchange of tensor shapes under the interleaved schedule with two stages.

With PP = 2 the next and the previous stage are one rank. P2PCommunicator._communicate_shapes posts its sends and its receives in the same
order, previous first, so what one rank sends to its previous stage arrives where the other waits for its own previous stage: micro-batches
of different lengths get each other's shapes. The tensors themselves go through _p2p_ops, which pairs them rightly; now their shapes do too.
Held by tests/parallel/ranks.py, interleaved_packs.
"""

from __future__ import annotations

import importlib.metadata

import torch
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megarl.engine.device import MEGATRON_CORE


def mend_shape_exchange() -> None:
    """Idempotent. Raises RuntimeError on another release of megatron-core: it may have changed what is replaced here."""
    found = importlib.metadata.version("megatron-core")
    if not found.startswith(MEGATRON_CORE + "."):
        raise RuntimeError(
            f"megatron-core {found}: the interleaved schedule is mended for {MEGATRON_CORE}.x; see megarl/engine/shape_exchange.py"
        )
    P2PCommunicator._communicate_shapes = _communicate_shapes


def _communicate_shapes(
    self: P2PCommunicator, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
) -> tuple[list[int], list[int]]:
    """Shapes (three sizes each) of the tensors about to come from the previous and the next stage; zeros where none comes."""
    device = torch.cuda.current_device()

    def sizes(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.tensor(tensor.size(), dtype=torch.int64, device=device)

    from_prev, from_next = torch.zeros(2, 3, dtype=torch.int64, device=device).unbind()
    works = p2p_communication._p2p_ops(
        tensor_send_prev=sizes(tensor_send_prev),
        tensor_recv_prev=from_prev if recv_prev else None,
        tensor_send_next=sizes(tensor_send_next),
        tensor_recv_next=from_next if recv_next else None,
        group=self.pp_group,
        prev_pipeline_rank=self.prev_rank,
        next_pipeline_rank=self.next_rank,
    )
    for work in works.values():
        work.wait()
    return from_prev.tolist(), from_next.tolist()
