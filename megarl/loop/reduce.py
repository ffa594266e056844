"""What a step measured on each rank into one number a metric: sums are added over ranks before anything is divided."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megarl.engine.parallel import Parallel
from megarl.loop.collect import Values
from megarl.objective import Sums, merge
from megarl.replay.metrics import RoutingSums


def reduce_sums(at: Parallel, sums: Sums) -> Sums:
    """Adds (or maxes) over the data-parallel ranks of the last stage, then tells everyone."""
    if at.coord.cp:  # every context-parallel rank computed the same loss
        sums = {key: value if key.endswith(":max") else torch.zeros_like(value) for key, value in sums.items()}
    if at.is_last_stage and at.layout.dp * at.layout.cp > 1:
        for op, keys in _by_operation(sums):
            joined = torch.stack([sums[key].double().to(at.device.device) for key in keys])
            dist.all_reduce(joined, op=op, group=at.replica_group)
            sums |= dict(zip(keys, joined))
    told = [sums]
    if at.layout.pp > 1:
        dist.broadcast_object_list(told, src=at.layout.rank_of(tp=0, cp=0, dp=0, pp=at.layout.pp - 1))
    return told[0]


def routing_values(at: Parallel, old: RoutingSums, new: RoutingSums) -> Values:
    """routing/* over all ranks, whose routers saw other rows or other
    layers. old: rollout and pi_old; new: pi_old and pi_theta.
    """
    device, layers = at.device.device, len(old.agree)
    differs = (torch.cat(old.differs).double() if old.differs else torch.zeros(0, dtype=torch.float64)).to(device)
    if at.layout.pp > 1:  # the stages hold different layers of the same rows
        dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=at.pp_group)
    differing = torch.tensor([float(differs.sum()), float(len(differs))], dtype=torch.float64)
    sums = torch.cat([old.agree, old.rows, new.agree, new.rows, differing]).to(device)
    worst = torch.tensor(old.worst_gap, dtype=torch.float64, device=device)
    if at.layout.world > 1:
        dist.all_reduce(sums)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    agree, rows, agree_new, rows_new, pair = sums.split([layers] * 4 + [2])
    values: Values = {}
    if rows.sum():
        values["routing/agree_rollout_old"] = float(agree.sum() / rows.sum())
        values["routing/layer_agreement"] = (agree / rows.clamp(min=1)).tolist()
        values["routing/any_layer_differs_frac"] = float(pair[0] / pair[1].clamp(min=1))
        values["routing/worst_gap"] = float(worst)
    if rows_new.sum():
        values["routing/agree_old_current"] = float(agree_new.sum() / rows_new.sum())
    return values


class Times:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.seconds: Values = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def merge_all(sums: Sums, parts: list[Sums]) -> Sums:
    for part in parts:
        sums = merge(sums, part)
    return sums


def _by_operation(sums: Sums) -> list[tuple[dist.ReduceOp.RedOpType, list[str]]]:
    keys = sorted(sums)
    maxima = [key for key in keys if key.endswith(":max")]
    both = [(dist.ReduceOp.MAX, maxima), (dist.ReduceOp.SUM, [key for key in keys if key not in maxima])]
    return [(op, chosen) for op, chosen in both if chosen]
