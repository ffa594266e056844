"""The trainer's score of the canary, which the servers' is compared with.

Along its own routes it needs nothing of theirs, and is taken while they load. Where a server took other routes, it is
compared along those, in a pass that replays them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config import CANARY_TOKENS
from megarl.engine.batch import Pack, PassRows, make_packs, router_rows
from megarl.engine.build import Engine
from megarl.engine.exchange import RouteShape, attach_routes
from megarl.engine.step import TokenScores
from megarl.loop.canary import Spread, WrongCanary, spread_of
from megarl.replay.routes import accept_routes
from megarl.rollout.sync_leader import Canary


class OwnScore:
    """Every rank calls every method. tokens: int64 [T], the canary. routes: None where the servers send none."""

    def __init__(self, engine: Engine, routes: RouteShape | None, micro_batch_tokens: int) -> None:
        self.engine, self.parallel, self.routes = engine, engine.model.parallel, routes
        self.weight_map = engine.model.weight_map
        self.at_once = max(micro_batch_tokens // CANARY_TOKENS, 1)  # in one pack
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(self.weight_map.vocab_size, (CANARY_TOKENS,), generator=generator)
        self._laid_out: dict[tuple[int, ...], list[Pack]] = {}
        self._logprobs: Tensor | None = None  # float32 [T-1], on the last stage
        self._live_routes: Tensor | None = None  # int16 [R, L, K]: of this rank's rows and layers

    def take(self) -> None:
        """Of the weights as they are now."""
        packs = self._packs([1] * self.parallel.layout.packs_multiple)
        scores = self.engine.logprobs(packs, "record" if self.routes is not None else "off", temperature=1.0)
        self._live_routes = packs[0].passes.live_routes
        self._logprobs = self._of(packs[0], scores[0])[0] if scores else None

    def spreads(self, servers: list[tuple[str, Canary]]) -> list[Spread]:
        """|log pi - log mu| over the canary, of each server, given with its URL: the same on every rank. The weights
        must be those of take(). WrongCanary where routes cannot be those of this model.
        """
        device = self.parallel.device.device
        routes = [self._accepted(url, canary.routes) for url, canary in servers]
        other = torch.tensor([each is not None and not self._are_live(each) for each in routes], device=device).int()
        dist.all_reduce(other, op=dist.ReduceOp.MAX)
        ours = dict.fromkeys(range(len(servers)), self._logprobs)
        ours |= self._replayed({n: each for n, each in enumerate(routes) if each is not None and other[n]})
        figures = torch.zeros(len(servers), len(Spread._fields), dtype=torch.float64, device=device)
        for number, (_, canary) in enumerate(servers):
            if (own := ours[number]) is not None:
                figures[number] = torch.tensor(spread_of(own - torch.from_numpy(canary.logprobs.copy())))
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
        return [Spread(*row) for row in figures.tolist()]

    def _accepted(self, url: str, routes: np.ndarray | None) -> Tensor | None:
        """int16 [T-1, MoE layers, K]"""
        if routes is None or self.routes is None:
            return None
        size, rows = self.weight_map, len(self.tokens) - 1
        try:
            routes = accept_routes(routes, rows, size.moe_layers, size.num_layers, size.num_experts, size.top_k)
        except ValueError as wrong:
            raise WrongCanary(url, f"weight sync: routes of the canary from {url}: {wrong}") from None
        return torch.from_numpy(routes.astype(np.int16))

    def _are_live(self, routes: Tensor) -> bool:
        """Whether the pass of take() chose the same experts, on this rank."""
        assert self.routes is not None and self._live_routes is not None
        (pack,) = self._packs([1])
        attach_routes(pack, routes, self.parallel, self.routes)
        theirs, live = pack.rollout.routes, self._live_routes.cpu()
        assert theirs is not None
        real = router_rows(pack.padded, self.parallel.layout, self.parallel.coord) < pack.rows
        return torch.equal(theirs.cpu()[real].sort(-1).values, live[real].sort(-1).values)

    def _replayed(self, routes: dict[int, Tensor]) -> dict[int, Tensor | None]:
        """The canary's score along each of these routes."""
        numbers = list(routes)
        if not numbers:
            return {}
        chunks = [numbers[i : i + self.at_once] for i in range(0, len(numbers), self.at_once)]
        spare = -len(chunks) % self.parallel.layout.packs_multiple
        padded = [*chunks, *[chunks[0]] * spare]
        packs = self._packs([len(chunk) for chunk in padded])
        for pack, chunk in zip(packs, padded, strict=True):
            assert self.routes is not None
            attach_routes(pack, torch.cat([routes[n] for n in chunk]), self.parallel, self.routes)
        scores = self.engine.logprobs(packs, "replay", temperature=1.0)
        ours: dict[int, Tensor | None] = dict.fromkeys(numbers)
        for pack, score, chunk in zip(packs, scores, padded, strict=bool(scores)):
            ours.update(zip(chunk, self._of(pack, score), strict=True))
        return ours

    def _packs(self, counts: list[int]) -> list[Pack]:
        """One of so many copies of the canary each, all of whose tokens are predicted but the first."""
        most, key = max(counts), tuple(counts)
        if key not in self._laid_out:
            assigned = [[*range(count)] for count in counts]
            self._laid_out[key] = make_packs(
                assigned, [self.tokens] * most, [1] * most, self.parallel.layout, self.parallel.coord
            )
        return [replace(pack, rollout=replace(pack.rollout), passes=PassRows()) for pack in self._laid_out[key]]

    def _of(self, pack: Pack, score: TokenScores) -> list[Tensor]:
        """float32 [T-1] of each copy."""
        logprobs = score.logprobs.cpu()
        return [logprobs[start : start + len(self.tokens) - 1] for start in pack.starts]
