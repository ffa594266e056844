"""What a step measured on each rank into one number a metric: sums are added over ranks before anything is divided."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megarl.engine.device import to_device
from megarl.engine.parallel import Parallel
from megarl.objective import Sums, merge
from megarl.replay.metrics import RoutingSums

Values = dict[str, float | list[float]]  # metrics of a step: a number, or one a MoE layer


def reduce_sums(parallel: Parallel, sums: Sums) -> Sums:
    """Adds (or maxes) over the data-parallel ranks of the last stage, then tells everyone."""
    if parallel.coord.cp:  # every context-parallel rank computed the same loss
        sums = {key: value if key.endswith(":max") else torch.zeros_like(value) for key, value in sums.items()}
    sums = _on_host(sums)
    if parallel.is_last_stage and parallel.layout.dp * parallel.layout.cp > 1:
        for op, keys in _by_operation(sums):
            joined = to_device(torch.stack([sums[key].double() for key in keys]), parallel.device.device)
            dist.all_reduce(joined, op=op, group=parallel.replica_group)
            sums |= dict(zip(keys, joined.cpu(), strict=True))
    reduced = [sums]  # pickled, a CUDA tensor would make a context on its rank's GPU in every other rank
    if parallel.layout.pp > 1:
        dist.broadcast_object_list(reduced, src=parallel.layout.rank_of(tp=0, cp=0, dp=0, pp=parallel.layout.pp - 1))
    return reduced[0]


def _on_host(sums: Sums) -> Sums:
    """One wait for all that lie on the device."""
    there = [key for key, value in sums.items() if value.device.type != "cpu"]
    if not there:
        return sums
    return sums | dict(zip(there, torch.stack([sums[key].double() for key in there]).cpu(), strict=True))


def routing_values(parallel: Parallel, old: RoutingSums, new: RoutingSums) -> Values:
    """routing/* over all ranks, whose routers saw other rows or other
    layers. old: rollout and pi_old; new: pi_old and pi_theta.
    """
    device, layers = parallel.device.device, len(old.agree)
    differs = torch.cat(old.differs).double() if old.differs else torch.zeros(0, dtype=torch.float64)
    differs = to_device(differs, device)
    if parallel.layout.pp > 1:  # the stages hold different layers of the same rows
        dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=parallel.pp_group)
    differing = torch.tensor([float(differs.sum()), float(len(differs))], dtype=torch.float64)
    sums = to_device(torch.cat([old.agree, old.rows, new.agree, new.rows, differing]), device)
    worst = to_device(torch.tensor(old.worst_gap, dtype=torch.float64), device)
    if parallel.layout.world > 1:
        dist.all_reduce(sums)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    agree, rows, agree_new, rows_new, pair = sums.cpu().split([layers] * 4 + [2])
    values: Values = {}
    if rows.sum():
        values["routing/agree_rollout_old"] = float(agree.sum() / rows.sum())
        values["routing/layer_agreement"] = (agree / rows.clamp(min=1)).tolist()
        values["routing/any_layer_differs_frac"] = float(pair[0] / pair[1].clamp(min=1))
        values["routing/worst_gap"] = float(worst)
    if rows_new.sum():
        values["routing/agree_old_current"] = float(agree_new.sum() / rows_new.sum())
    return values


def rates(metrics: Values, seconds: float) -> Values:
    """time/step_s and tokens a second: of the whole step, and of its updates alone, where it had one."""
    tokens, update = metrics["response/tokens"], metrics["time/update_s"]
    assert isinstance(tokens, float) and isinstance(update, float)
    values: Values = {"time/step_s": seconds, "throughput/tokens_per_s": tokens / seconds}
    if "optim/grad_norm" in metrics:  # without an update, update_s is the time of doing nothing
        values["throughput/train_tokens_per_s"] = tokens / update
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
