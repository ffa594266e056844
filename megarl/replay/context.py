"""Recording and replaying routes inside megatron-core's routers.

megatron-core asks `router.router_replay.get_replay_topk(...)` for the experts of each token, if that attribute is set.
We set an object of ours there for the length of one schedule run and take it away afterwards, so no state outlives the
run, nothing is process-wide, and without replay and metrics there is nothing on the path.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Router(Protocol):
    router_replay: Any


@dataclass
class Recorded:
    """What the routers of one chunk did for one micro-batch, rows in the order of this rank's slice.

    live: a layer's top-k of the live scores of this pass, [rows, K]; under replay, given the replayed earlier layers.
    lowest: the least score among those, and among the replayed (or
    compared) experts, [rows]; empty where there are none.
    """

    live: list[Tensor] = field(default_factory=list)
    lowest: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def stacked(self) -> tuple[Tensor, Tensor | None]:
        """live routes, int16 [rows, layers, K]; gap [rows, layers]: how far the replayed lie below them in score."""
        live = torch.stack(self.live, dim=1).to(torch.int16)
        if not self.lowest:
            return live, None
        chosen, replayed = (torch.stack(layers, dim=1) for layers in zip(*self.lowest, strict=True))
        return live, (chosen - replayed).clamp_(min=0)


class _Hook:
    """Stands in one router's `router_replay`."""

    def __init__(self, recomputes: bool) -> None:
        self.recomputes = recomputes
        self.target: Tensor | None = None
        self.has_route: Tensor | None = None
        self.replay = False
        self.record: Recorded | None = None  # set while a micro-batch's forward runs; None means activation recompute
        self.used: deque[Tensor] = deque()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """scores float [rows, E], the full live scores: the gate is
        gathered from them, so its gradient reaches the router.
        """
        if self.record is None:
            # Backward passes run in the order of the forwards, within one chunk, under 1F1B and under the interleaved
            # schedule.
            chosen = self.used.popleft()
            return scores.gather(1, chosen), chosen
        assert default_compute_topk is not None
        values, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        self.record.live.append(chosen)
        if self.target is not None:
            if len(self.target) != len(scores):
                raise RuntimeError(f"{len(self.target)} rows of routes for {len(scores)} rows of tokens")
            replayed = scores.gather(1, self.target)
            self.record.lowest.append((values.detach().amin(1), replayed.detach().amin(1)))
            if self.replay and self.has_route is None:
                values, chosen = replayed, self.target
            elif self.replay and self.has_route is not None:
                chosen = torch.where(self.has_route[:, None], self.target, chosen)
                values = scores.gather(1, chosen)
        if self.recomputes:
            self.used.append(chosen)
        return values, chosen


class Replay:
    """Routing replay of one model for one schedule run.

    chunks: for each model chunk of this rank, its routers in layer order. recomputes: whether backward passes run the
    routers again (megatron-core's recompute_granularity): else no route is kept for them. Use:
        with replay_schedule(chunks) as replay:
            ... for each micro-batch, in the forward step: with replay.forward(chunk, routes, has_route, replay=True) as
            recorded: model(...)
    """

    def __init__(self, chunks: Sequence[Sequence[Router]], recomputes: bool = True) -> None:
        self._hooks = [[_Hook(recomputes) for _ in routers] for routers in chunks]
        self._chunks = chunks

    def attach(self) -> None:
        for routers, hooks in zip(self._chunks, self._hooks, strict=True):
            for router, hook in zip(routers, hooks, strict=True):
                router.router_replay = hook

    def detach(self) -> None:
        for routers in self._chunks:
            for router in routers:
                router.router_replay = None

    @contextmanager
    def forward(
        self, chunk: int, routes: Tensor | None, has_route: Tensor | None = None, *, replay: bool
    ) -> Iterator[Recorded]:
        """One micro-batch through one chunk.

        routes: integer [rows, layers of the chunk, K] to replay (or, with replay=False, only to compare with); None for
        neither.
        has_route: bool [rows]; a row without one is routed live. None: every row has one.
        """
        recorded = Recorded()
        targets = (
            None if routes is None else routes.transpose(0, 1).to(torch.long, memory_format=torch.contiguous_format)
        )
        for i, hook in enumerate(self._hooks[chunk]):
            hook.target = None if targets is None else targets[i]
            hook.has_route, hook.replay, hook.record = has_route, replay, recorded
        try:
            yield recorded
        finally:
            for hook in self._hooks[chunk]:
                hook.target = hook.has_route = hook.record = None


@contextmanager
def replay_schedule(chunks: Sequence[Sequence[Router]], recomputes: bool = True) -> Iterator[Replay]:
    """Attaches hooks for one schedule run; whatever happens inside, nothing is left on the routers."""
    replay = Replay(chunks, recomputes)
    replay.attach()
    try:
        yield replay
    finally:
        replay.detach()
