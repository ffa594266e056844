"""What a step measured on each rank into one number a metric: sums are added over ranks before anything is divided."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

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
        maxima = sorted(key for key in sums if key.endswith(":max"))
        added = sorted(sums.keys() - maxima)
        both = over_ranks(parallel, _stacked(sums, added), _stacked(sums, maxima), parallel.replica_group)
        sums |= dict(zip(added, both[0], strict=True)) | dict(zip(maxima, both[1], strict=True))
    reduced = [sums]  # pickled, a CUDA tensor would make a context on its rank's GPU in every other rank
    if parallel.layout.pp > 1:
        source = parallel.layout.rank_of(tp=0, cp=0, dp=0, pp=parallel.layout.pp - 1)
        dist.broadcast_object_list(reduced, src=source, group=parallel.host_group)
    return reduced[0]


def _on_host(sums: Sums) -> Sums:
    """One wait for all that lie on the device."""
    there = [key for key, value in sums.items() if value.device.type != "cpu"]
    if not there:
        return sums
    return sums | dict(zip(there, _stacked(sums, there).cpu(), strict=True))


def _stacked(sums: Sums, keys: list[str]) -> Tensor:
    return torch.stack([sums[key].double() for key in keys]) if keys else torch.zeros(0, dtype=torch.float64)


def rollout_routing(parallel: Parallel, old: RoutingSums) -> Values:
    """Of the rollout's routes with pi_old's, over all ranks, whose routers saw other rows or other layers."""
    differs = torch.cat(old.differs).double() if old.differs else torch.zeros(0, dtype=torch.float64)
    differs = to_device(differs, parallel.device.device)
    if parallel.layout.pp > 1:  # the stages hold different layers of the same rows
        dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=parallel.pp_group)
    differing = torch.tensor([float(differs.sum()), float(len(differs))], dtype=torch.float64)
    sums, worst = torch.cat([old.agree, old.rows, differing]), torch.tensor([old.worst_gap], dtype=torch.float64)
    if parallel.layout.world > 1:
        sums, worst = over_ranks(parallel, sums, worst)
    agree, rows, pair = sums.split([len(old.agree), len(old.rows), 2])
    if not rows.sum():
        return {}
    return {
        "routing/agree_rollout_old": float(agree.sum() / rows.sum()),
        "routing/layer_agreement": (agree / rows.clamp(min=1)).tolist(),
        "routing/any_layer_differs_frac": float(pair[0] / pair[1].clamp(min=1)),
        "routing/worst_gap": float(worst),
    }


def update_routing(parallel: Parallel, new: RoutingSums) -> Values:
    """Of pi_old's routes with pi_theta's, over all ranks."""
    sums = torch.cat([new.agree, new.rows])
    if parallel.layout.world > 1:
        sums, _ = over_ranks(parallel, sums, sums[:0])
    agree, rows = sums.chunk(2)
    return {"routing/agree_old_current": float(agree.sum() / rows.sum())} if rows.sum() else {}


def over_ranks(
    parallel: Parallel, sums: Tensor, maxima: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """float64 [n] and [m] of each rank of a group (None: all) -> their sums and maxima, by one all-reduce: each rank's
    maxima have places of their own in it.
    """
    places = torch.zeros(dist.get_world_size(group), len(maxima), dtype=torch.float64)
    places[dist.get_rank(group)] = maxima
    joined = to_device(torch.cat([sums, places.flatten()]), parallel.device.device)
    dist.all_reduce(joined, group=group)
    summed, everyones = joined.cpu().split([len(sums), places.numel()])
    return summed, everyones.view_as(places).amax(0)


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

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """What is inside counts under this name, and in no lap."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.seconds[name] = cast(float, self.seconds.get(name, 0.0)) + seconds
        self._last += seconds


def merge_all(sums: Sums, parts: list[Sums]) -> Sums:
    for part in parts:
        sums = merge(sums, part)
    return sums
