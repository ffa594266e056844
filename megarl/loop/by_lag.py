"""Mismatch and staleness apart by how old the weights of a token were (rollout.max_lag)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megarl.config import Config
from megarl.engine.batch import Pack
from megarl.engine.device import to_host
from megarl.engine.parallel import Parallel
from megarl.loop.batch import Span
from megarl.loop.reduce import Values, reduce_sums
from megarl.objective import Sums, finish, merge, mismatch_metrics, staleness_metrics

CHANGED = -1  # stands for the tokens without lag in responses that had older weights before


def by_lag(config: Config, parallel: Parallel, packs: list[Pack], spans: list[list[Span]]) -> Values:
    """k3 of both over the tokens of each lag, in batches of updates; 0 where there is none. And of the tokens whose
    weights are those of now in responses that had others before: what rollout.in_flight does. spans: of each response
    of the batch. Collective, after the updates.
    """
    if not config.rollout.max_lag:
        return {}
    per_batch = config.batch.minibatches
    lags = [*range(-(-config.rollout.max_lag // per_batch) + 1), CHANGED]
    sums: Sums = {}
    scored = [pack for pack in packs if parallel.is_last_stage and pack.passes.old_logprobs is not None]
    there = to_host([x for pack in scored for x in (pack.passes.old_logprobs, pack.passes.logprobs)])
    for pack, old, new in zip(scored, there[::2], there[1::2], strict=True):
        assert old is not None
        lag_of, changed = _lags(pack, spans, per_batch)
        for lag in lags:
            mask = pack.mask.bool() & (changed if lag == CHANGED else lag_of == lag)
            part = mismatch_metrics(old, pack.rollout.logprobs, mask, config.objective.is_cap)
            if new is not None:
                part |= staleness_metrics(new[mask], old[mask])
            sums = merge(sums, {f"{lag}/{key}": value for key, value in part.items()})
    means = finish(reduce_sums(parallel, sums))
    in_flight = means.get(f"{CHANGED}/mismatch/kl_k3", math.nan)
    values: Values = {
        f"async/{of}_k3_by_lag": [_or_zero(means.get(f"{lag}/{of}/kl_k3", 0.0)) for lag in lags if lag != CHANGED]
        for of in ("mismatch", "staleness")
    }
    if math.isfinite(in_flight):
        values["async/in_flight_k3"] = in_flight
    return values


def _lags(pack: Pack, spans: list[list[Span]], per_batch: int) -> tuple[Tensor, Tensor]:
    """Of each row: the lag in batches, and whether its weights are those of now after others before."""
    lag_of, changed = torch.full((len(pack.mask),), CHANGED), torch.zeros(len(pack.mask), dtype=torch.bool)
    for start, response in zip(pack.starts, pack.responses, strict=True):
        for span in spans[response]:
            rows = slice(start + span.first, start + span.last)
            lag_of[rows], changed[rows] = -(-span.lag // per_batch), span.later and not span.lag
    return lag_of, changed


def _or_zero(mean: float) -> float:
    """The mean over nothing is NaN."""
    return mean if math.isfinite(mean) else 0.0
