"""What the functions of an objective are given and give back. R: unmasked tokens of a call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from megarl.objective.aggregate import Segments, number

# exp of this is finite in float32, and so is its product with a weight: inf * 0 would be NaN.
LOG_MAX = 60.0


def exp(log_x: Tensor) -> Tensor:
    """exp that stays finite: e^60 at most."""
    return log_x.clamp(max=LOG_MAX).exp_()


@dataclass(frozen=True)
class Tokens:
    """The unmasked tokens of a call, in order; all tensors are [R], finite and constants to autograd.

    logprobs, old_logprobs, rollout_logprobs: log pi_theta, log pi_old, log mu of each token. advantages: its A.
    seq_ids: int64, the response it belongs to.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    seq_ids: Tensor

    @property  # not kept: memory costs more than one subtraction
    def log_ratio(self) -> Tensor:
        """log r = log pi_theta - log pi_old [R]: the staleness."""
        return self.logprobs - self.old_logprobs

    @property
    def log_rho(self) -> Tensor:
        """log rho = log pi_old - log mu [R]: the training-inference discrepancy."""
        return self.old_logprobs - self.rollout_logprobs

    @cached_property
    def responses(self) -> Segments:
        """The response of each token, for sums and sizes over whole responses."""
        return number(self.seq_ids)

    def response_mean(self, x: Tensor) -> Tensor:
        """The mean of x [R] over each response, spread over its tokens [R]."""
        return self.responses.spread_sums(x) / self.responses.sizes()


class Factor(NamedTuple):
    """A factor of each token's gradient: value [R]; cut: bool [R], where it was truncated or set to 0, for the metrics.

    cut None says nowhere.
    """

    value: Tensor
    cut: Tensor | None = None
