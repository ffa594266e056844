"""Where a rank stands in a parallel layout: pure arithmetic, the same order of ranks as megatron-core ("tp-cp-ep-dp-pp")."""

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
    world: int = 1

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Replicas of an expert."""
        return self.world // (self.etp * self.ep * self.pp)

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
        """Global numbers (from 0) of the transformer layers of one model chunk of one stage, split evenly."""
        each = num_layers // (self.pp * self.vpp)
        start = (chunk * self.pp + pp) * each
        return range(start, start + each)


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
