"""Critic and reference inside torchrun ranks, in several layouts:
`objective_ranks.py MODEL OUT LAYOUT...` (names of LAYOUTS).

Rank 0 writes OUT/LAYOUT.pt: values, advantages and value gradients, and
the gradient of a policy loss with KL and entropy terms.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megarl.config import Config, load_config
from megarl.engine.batch import Pack
from megarl.engine.build import Engine, build_engine
from megarl.engine.checkpoint import load_checkpoint, save_checkpoint
from megarl.engine.critic import VALUE_HEAD
from megarl.engine.parallel import destroy_parallel
from megarl.errors import UserError
from megarl.loop.batch import Batch
from megarl.loop.learn import Learner
from tools.equality_ranks import RESPONSES, gather_shards, lay_out, whole_tensors

LAYOUTS: dict[str, list[str]] = {
    "one": ["engine.micro_batch_tokens=4096"],
    "split": ["engine.micro_batch_tokens=48"],
    "cp2": ["parallel.cp=2", "engine.micro_batch_tokens=48"],
    "dp2": ["engine.micro_batch_tokens=48", "engine.distributed_optimizer=true"],
    "tp2_pp2_ep2": ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "engine.micro_batch_tokens=48"],
    "tp2_pp2_vpp2": ["parallel.tp=2", "parallel.pp=2", "parallel.vpp=2", "engine.micro_batch_tokens=48"],
}
PPO = [
    "objective.preset=ppo",
    "objective.kl_coef=0.1",
    "objective.entropy_coef=0.05",
    "critic.lr=1e-3",
    "train.lr=1e-3",
    "train.steps=4",
]


@torch.no_grad()
def move(engine: Engine, size: float, but: str = "") -> None:
    """Every weight away from where it was loaded, the same in every layout."""
    for param, tensor in engine.model.params():
        for piece in param.pieces:
            part = tensor[piece.local.slices]
            grid = [torch.arange(a, a + n).float() for a, n in zip(piece.rect.offset, piece.rect.size, strict=True)]
            wave = sum(
                g.view([-1 if i == axis else 1 for i in range(len(grid))]) * (axis + 1.3) for axis, g in enumerate(grid)
            )
            part += size * torch.sin(wave + len(piece.hf_name))
    if hasattr(engine.optimizer, "reload_model_params"):
        engine.optimizer.reload_model_params()


def whole(engine: Engine, mine: Any, sharded: bool) -> Any:
    """Gradients of all ranks as whole Hugging Face tensors, and `mine` of all ranks."""
    if sharded:
        gather_shards(engine)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return whole_tensors(engine, lambda tensor: tensor.main_grad), everyone


def by_response(packs: list[Pack], values: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    found = {}
    for pack, tensor in zip(packs, values):
        found |= {i: tensor[s : s + sum(RESPONSES[i]) - 1].clone() for i, s in zip(pack.responses, pack.starts)}
    return found


def joined(parts: list[dict[int, torch.Tensor]]) -> torch.Tensor:
    everything = {i: tensor for part in parts for i, tensor in part.items()}
    return torch.cat([everything[i] for i in range(len(RESPONSES))])


def measure(config: Config) -> dict[str, Any]:
    engine = build_engine(config, optimizer_steps=4, temperature=0.9)
    learner = Learner(config, engine)
    assert learner.critic_step is not None and learner.reference is not None
    critic, sharded = learner.critic_step.critic, config.engine.distributed_optimizer
    move(critic, 0.02)
    packs = lay_out(engine, config, with_routes=False)
    start = by_response(packs, [logprobs for logprobs, _ in engine.logprobs(packs, "off")])
    move(engine, 0.01)
    moved = [tensor.clone() for _, tensor in engine.model.params()]
    for pack, (logprobs, _) in zip(packs, engine.logprobs(packs, "off")):
        pack.passes.old_logprobs = logprobs + 0.1 * torch.sin(pack.labels.float() + pack.positions.float())
    learner._reference_and_values(packs, _Times())
    assert all(torch.equal(a, b) for a, (_, b) in zip(moved, engine.model.params()))  # swapped back, bitwise
    reference = by_response(packs, [pack.passes.ref_logprobs for pack in packs if pack.passes.ref_logprobs is not None])
    for i, logprobs in reference.items():
        assert torch.equal(logprobs, start[i])  # the reference is the start, bitwise
    values = by_response(packs, [pack.passes.old_values for pack in packs if pack.passes.old_values is not None])
    _judge_packs_with_routes(learner, config, values, reference)
    advantages = by_response(packs, [pack.passes.advantages for pack in packs]) if values else {}
    learner.critic_step.gradients(packs)
    value_grad, parts = whole(critic, (values, advantages), sharded)
    engine.gradients(packs, "off", learner._loss)
    policy_grad, _ = whole(engine, None, sharded)
    assert value_grad[VALUE_HEAD].abs().max() > 0
    return {
        "values": joined([v for v, _ in parts]),
        "advantages": joined([a for _, a in parts]),
        "value_grad": value_grad,
        "policy_grad": policy_grad,
    }


def _judge_packs_with_routes(
    learner: Learner, config: Config, values: dict[int, torch.Tensor], reference: dict[int, torch.Tensor]
) -> None:
    """docs/routing.md, trap 14: critic and reference run with replay off, whatever routes a pack has."""
    packs = lay_out(learner.engine, config, with_routes=True)
    assert all(pack.rollout.routes is not None for pack in packs)
    learner._reference_and_values(packs, _Times())
    for name, want in (("old_values", values), ("ref_logprobs", reference)):
        found = by_response(packs, [value for pack in packs if (value := getattr(pack.passes, name)) is not None])
        assert all(torch.equal(found[i], want[i]) for i in want), f"trap 14: {name} came from replayed routes"


class _Times:
    def lap(self, name: str) -> None: ...


def learned(config: Config, folder: Path) -> None:
    """Warm-up leaves the policy alone; a checkpoint brings the critic
    back bitwise; a NaN is named or skipped and changes nothing.
    """

    def batch(engine: Engine) -> Batch:
        packs = lay_out(engine, config, with_routes=False)
        return Batch(
            [packs, lay_out(engine, config, with_routes=False)],
            [f"response {i}" for i in range(len(RESPONSES))],
            {},
            [],
            [],
            [[] for _ in RESPONSES],
        )

    def weights(engine: Engine) -> list[torch.Tensor]:
        return [tensor.detach().clone() for _, tensor in engine.model.params()]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    config.critic.warmup_steps = 1
    engine = build_engine(config, optimizer_steps=8)
    learner = Learner(config, engine)
    assert learner.critic is not None
    policy, critic = weights(engine), weights(learner.critic)
    learned = learner.learn(batch(engine), 0)
    assert learned.optimizer_steps == 0 and same(policy, weights(engine)) and not same(critic, weights(learner.critic))
    learned = learner.learn(batch(engine), 1)
    assert learned.optimizer_steps == 2 and not same(policy, weights(engine))
    assert {
        "critic/loss",
        "critic/explained_variance",
        "critic/grad_norm",
        "policy/kl_reference",
        "policy/entropy",
    } <= learned.metrics.keys()
    path = save_checkpoint(engine, folder, 2, {"optimizer_steps": 2}, keep=1, critic=learner.critic)
    metrics = learner.learn(batch(engine), 2).metrics
    again = build_engine(config, optimizer_steps=8)
    resumed = Learner(config, again)
    load_checkpoint(again, path, resumed.critic)
    same_metrics = resumed.learn(batch(again), 2).metrics
    assert (
        resumed.critic is not None
        and same(weights(engine), weights(again))
        and same(weights(learner.critic), weights(resumed.critic))
    )
    timeless = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in (metrics, same_metrics)]
    assert timeless[0] == timeless[1]
    nothing = learner.learn(
        Batch([], [], {}, [], [], []), 3
    ).metrics  # fault 9: it had the critic's norm of the step before
    assert not [key for key in nothing if key.startswith(("critic/", "optim/"))]

    before = weights(engine)
    spoilt = batch(engine)
    if dist.get_rank() == dist.get_world_size() - 1:
        spoilt.minibatches[1][0].rollout.rewards.fill_(float("nan"))  # the reward of one replica's responses
    config.train.on_bad_batch = "skip"
    learned = learner.learn(spoilt, 3)
    updates = learned.optimizer_steps
    assert (
        updates < 2
        and learned.metrics["batch/skipped_updates"] == 2 - updates
        and all(x.isfinite().all() for x in weights(engine))
    )
    assert updates or same(before, weights(engine))
    config.train.on_bad_batch = "stop"
    spoilt = batch(engine)
    for _, tensor in engine.model.params():
        tensor.data.fill_(float("nan"))
    try:
        learner.learn(spoilt, 3)
    except UserError as error:
        assert "step 4: old_logprobs of response " in str(error) and "hold nan" in str(error), error
    else:
        raise AssertionError("a policy of NaN went unnoticed")


if __name__ == "__main__":
    model, out, *names = sys.argv[1:]
    make = partial(load_config, None)
    for name in names:
        config = make([f"model.path={model}", *PPO, *LAYOUTS[name]])
        found = measure(config)
        if name in ("split", "tp2_pp2_ep2"):
            config.batch.minibatches = 2
            learned(config, Path(out) / f"checkpoints_{name}")
        if dist.get_rank() == 0:
            torch.save(found, Path(out) / f"{name}.pt")
        dist.barrier()
    destroy_parallel()
