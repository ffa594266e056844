"""Mismatch and staleness apart by how old the weights of a token were (rollout.max_lag)."""

from __future__ import annotations

import math

import torch

from megarl.config import Config
from megarl.engine.batch import Pack
from megarl.engine.parallel import Parallel
from megarl.loop.batch import Span
from megarl.loop.reduce import Values, merge_all, reduce_sums
from megarl.objective import Sums, finish, mismatch_metrics, staleness_metrics

CHANGED = -1  # stands for the tokens without lag in responses that had older weights before


def by_lag(config: Config, parallel: Parallel, packs: list[Pack], spans: list[list[Span]]) -> Values:
    """k3 of both over the tokens of each lag, in batches of updates; 0 where there is none. And of the tokens whose
    weights are those of now in responses that had others before: what rollout.in_flight does. spans: of each response
    of the batch. Collective, after the updates.
    """
    if not config.rollout.max_lag:
        return {}
    per_batch = config.batch.minibatches
    sums: dict[int, list[Sums]] = {lag: [] for lag in (*range(config.rollout.max_lag // per_batch + 1), CHANGED)}
    for pack in packs if parallel.is_last_stage else []:
        if pack.passes.old_logprobs is None:
            continue
        old = pack.passes.old_logprobs.cpu()
        lag_of, changed = torch.full((len(pack.mask),), CHANGED), torch.zeros(len(pack.mask), dtype=torch.bool)
        for start, response in zip(pack.starts, pack.responses, strict=True):
            for span in spans[response]:
                rows = slice(start + span.first, start + span.last)
                lag_of[rows], changed[rows] = -(-span.lag // per_batch), span.later and not span.lag
        for lag, of_lag in sums.items():
            mask = pack.mask.bool() & (changed if lag == CHANGED else lag_of == lag)
            of_lag.append(mismatch_metrics(old, pack.rollout.logprobs, mask, config.objective.is_cap))
            if pack.passes.logprobs is not None:
                of_lag.append(staleness_metrics(pack.passes.logprobs.cpu()[mask], old[mask]))
    k3 = {lag: finish(reduce_sums(parallel, merge_all({}, of_lag))) for lag, of_lag in sums.items()}
    in_flight = k3.pop(CHANGED).get("mismatch/kl_k3", math.nan)
    values: Values = {
        f"async/{of}_k3_by_lag": [_or_zero(means.get(f"{of}/kl_k3", 0.0)) for means in k3.values()]
        for of in ("mismatch", "staleness")
    }
    if math.isfinite(in_flight):
        values["async/in_flight_k3"] = in_flight
    return values


def _or_zero(mean: float) -> float:
    """The mean over nothing is NaN."""
    return mean if math.isfinite(mean) else 0.0
