"""Collectives of a rank that has no neighbours: checked, counted, and answered as if all ranks were like this one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from megarl.simulate.ledger import Ledger, Sent, source_line, source_lines
from megarl.simulate.numbers import forget, known, learn

INTO_FIRST = ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_")  # (output, input, group, ...)
HOST_GROUPS: set[str] = set()  # groups for tensors of the host: gloo's
COALESCED = ("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_")
LISTS = ("allgather_", "reduce_scatter_", "scatter_", "gather_", "alltoall_", *COALESCED)  # (outputs, inputs, ...)


def run_collective(ledger: Ledger, func: Any, args: tuple[Any, ...]) -> Any:
    """One c10d operator. RuntimeError where NCCL would refuse it: a tensor on the host, other sizes than the splits
    say, two dtypes.
    """
    kind = func._schema.name.split("::")[1]
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    group = next((g for x in args if (g := _group(x)) is not None), None)
    if group is not None and group.group_name in HOST_GROUPS:
        ledger.wait(f"{kind.strip('_')} between hosts")
        return func(*args)
    if kind == "barrier":
        ledger.wait(kind)
        return FakeWork().boxed()
    for x in tensors:
        if not isinstance(x, FakeTensor) or x.device.type != "cuda":
            raise RuntimeError(
                f"{kind} of a tensor on the host, {tuple(x.shape)} {x.dtype}, which NCCL refuses, at {source_lines()}"
            )
    given = args[1] if kind in INTO_FIRST or kind in LISTS else args[0]
    _count(ledger, kind, given, group, args)
    if kind in INTO_FIRST:
        _answer(kind, args[0], args[1], args)
    elif kind not in ("allreduce_", "send"):  # what arrives is unknown; a sum keeps what this rank knows
        for x in tree_leaves(args[0]):
            forget(x)
    work = FakeWork().boxed()
    if len(func._schema.returns) == 1:
        return work
    return args[0], work


def _count(ledger: Ledger, kind: str, given: Any, group: dist.ProcessGroup | None, args: tuple[Any, ...]) -> None:
    size = sum(x.numel() * x.element_size() for x in tree_leaves(given) if isinstance(x, Tensor))
    ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else ()
    name = group.group_desc if group is not None else ""
    if kind in ("send", "recv_"):
        ranks = (ranks[args[2]],)
    entry = Sent(ledger.phase, name, ranks, kind.strip("_"), source_line())
    ledger.sent[entry] += size
    ledger.calls[entry] += 1


def _group(x: Any) -> dist.ProcessGroup | None:
    kind: Any = x._type() if isinstance(x, torch.ScriptObject) else None
    if kind is not None and kind.name() == "ProcessGroup":
        return dist.ProcessGroup.unbox(x)
    return None


def _answer(kind: str, out: Tensor, given: Tensor, args: tuple[Any, ...]) -> None:
    if out.dtype != given.dtype:
        raise RuntimeError(f"{kind}: {out.dtype} of {given.dtype} at {source_lines()}")
    if kind == "alltoall_base_":
        for what, splits, x in (("received", args[3], out), ("sent", args[4], given)):
            if splits and sum(splits) != x.shape[0]:
                raise RuntimeError(f"{kind}: {splits} rows {what} of {tuple(x.shape)} at {source_lines()}")
    numbers = known(given)
    if numbers is not None and kind == "_allgather_base_":
        learn(out, numbers.reshape(-1).repeat(out.numel() // max(1, given.numel())).reshape(out.shape))
    elif numbers is not None and kind == "alltoall_base_" and out.shape == given.shape:
        learn(out, numbers.clone())
    else:
        forget(out)
