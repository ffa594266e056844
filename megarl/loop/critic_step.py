"""PPO's other half: what the critic thinks of a batch, the advantages that follow, and its own updates."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config import Config
from megarl.engine.batch import Pack
from megarl.engine.build import Engine
from megarl.engine.critic import build_critic
from megarl.engine.device import to_device, to_host
from megarl.objective import Sums, gae, value_loss
from megarl.objective.metrics import mean, unmasked


class CriticStep:
    """Owns the critic. Every rank calls every method; tensors of values exist on the last stage only."""

    def __init__(self, config: Config, policy: Engine) -> None:
        self.settings = config.critic
        self.critic = build_critic(config, policy.model.parallel, config.optimizer_steps)

    def value(self, packs: list[Pack]) -> None:
        """Values before the first update, and from them and the rewards GAE's advantages and returns, one a token."""
        values = to_host(self.critic.values(packs))
        if not self.critic.model.parallel.is_last_stage:
            return
        gamma, lam = self.settings.gamma, self.settings.gae_lambda
        for pack, old in zip(packs, values, strict=True):
            assert old is not None
            passes = pack.passes
            passes.old_values = old
            passes.advantages, passes.returns = gae(
                pack.rollout.rewards, old, pack.mask, pack.seq_ids, gamma=gamma, lam=lam
            )

    def gradients(self, packs: list[Pack]) -> list[Sums]:
        """Of the value loss, a mean over the response tokens of the mini-batch, whatever
        replica and pack they lie in.
        """
        parallel = self.critic.model.parallel
        tokens = to_device(torch.stack([pack.mask.sum() for pack in packs]).sum(), parallel.device.device)
        if parallel.layout.dp > 1:
            dist.all_reduce(tokens, group=parallel.dp_group)
        count = tokens.clamp(min=1)  # stays where it is: to know it the host would wait for the policy's update

        def loss(pack: Pack, values: Tensor) -> tuple[Tensor, Sums]:
            passes = pack.passes
            assert passes.old_values is not None and passes.returns is not None
            old, returns, mask = (to_device(x, values.device) for x in (passes.old_values, passes.returns, pack.mask))
            total = value_loss(values, old, returns, mask, clip=self.settings.value_clip, denominator=1.0)
            return total / count, _metrics(
                total, values.detach(), old, returns, unmasked(mask), self.settings.value_clip
            )

        return self.critic.gradients(packs, "off", loss)


def _metrics(total: Tensor, values: Tensor, old: Tensor, returns: Tensor, rows: Tensor, clip: float) -> Sums:
    values, old, returns = (x[rows].double() for x in (values, old, returns))
    return {
        **mean("critic/loss", total, len(rows)),
        **mean("critic/value_mean", old.sum(), len(rows)),
        **mean("critic/return_mean", returns.sum(), len(rows)),
        **mean("critic/return_square", returns.square().sum(), len(rows)),
        **mean("critic/square_error", (returns - old).square().sum(), len(rows)),
        **mean("critic/clip_frac", ((values - old).abs() > clip).sum(), len(rows)),
    }


def explained(values: dict[str, float]) -> dict[str, float]:
    """critic/explained_variance = 1 - E[(R - V)^2] / Var R in place of the moments it is made of."""
    if "critic/return_square" not in values:
        return values
    variance = values.pop("critic/return_square") - values["critic/return_mean"] ** 2
    return {**values, "critic/explained_variance": 1 - values.pop("critic/square_error") / max(variance, 1e-12)}
