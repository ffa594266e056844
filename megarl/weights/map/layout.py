"""Where a rank stands in a parallel layout: pure arithmetic, the same
order of ranks as megatron-core ("tp-cp-ep-dp-pp").
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    first_stage_layers: int | None = None  # uneven pipeline; None is an even share of what is left
    last_stage_layers: int | None = None
    world: int = 1

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Replicas of an expert."""
        return self.world // (self.etp * self.ep * self.pp)

    @property
    def packs_multiple(self) -> int:
        """A replica's packs of one pass are a multiple of it: the interleaved schedule takes them in rounds of pp."""
        return self.pp if self.vpp > 1 else 1

    def coord(self, rank: int) -> Coord:
        per_stage = self.world // self.pp
        pp, inside = divmod(rank, per_stage)
        return Coord(
            rank=rank,
            tp=inside % self.tp,
            cp=inside // self.tp % self.cp,
            dp=inside // (self.tp * self.cp),
            pp=pp,
            etp=inside % self.etp,
            ep=inside // self.etp % self.ep,
            edp=inside // (self.etp * self.ep),
        )

    def rank_of(self, *, tp: int, cp: int, dp: int, pp: int) -> int:
        return tp + self.tp * (cp + self.cp * dp) + pp * (self.world // self.pp)

    def stage_layers(self, num_layers: int, pp: int, chunk: int) -> range:
        """Global numbers (from 0) of the transformer layers of one model chunk of one stage."""
        if self.vpp > 1:
            each = num_layers // (self.pp * self.vpp)
            start = (chunk * self.pp + pp) * each
            return range(start, start + each)
        counts = self.stage_sizes(num_layers)
        return range(sum(counts[:pp]), sum(counts[: pp + 1]))

    def stage_sizes(self, num_layers: int) -> list[int]:
        """Layers of each stage (all chunks together)."""
        fixed = {
            stage: n
            for stage, n in ((0, self.first_stage_layers), (self.pp - 1, self.last_stage_layers))
            if n is not None
        }
        free = self.pp - len(fixed)
        each = (num_layers - sum(fixed.values())) // free if free else 0
        return [fixed.get(stage, each) for stage in range(self.pp)]


@dataclass(frozen=True)
class Coord:
    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int
