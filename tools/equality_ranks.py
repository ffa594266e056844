"""What the ranks of tools/equality.py do: `equality_ranks.py FOLDER NAME...` measures layouts, one after the other.

A NAME is the number of a row, or a checkpoint of FOLDER, whose reference is then measured. The result goes to FOLDER.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.equality import MODES, ROWS, Row  # noqa: E402

TEMPERATURE = 0.9
# (prompt, response) tokens of the mini-batch: uneven, a response of one token, one that is longer than a small
# micro-batch
RESPONSES = [(4, 9), (4, 1), (4, 20), (7, 3), (7, 12), (7, 30), (2, 5), (2, 16), (2, 2), (9, 8), (9, 1), (9, 40)]
# The first step has two mini-batches after a pi_old pass, the second one whose own pass is pi_old. Adam's epsilon is
# of the size of the gradients: where it is tiny, the sign of a gradient that is rounding alone decides an update.
STEPS = (2, 1)
TRAIN = ["train.lr=1e-2", "train.adam_eps=1e-3", "train.clip_grad=0.5", "replay.metrics=true"]


def worker(folder: Path, names: list[str]) -> None:
    import torch
    import torch.distributed as dist

    from megarl.config import load_config
    from megarl.engine.build import build_engine
    from megarl.engine.parallel import destroy_parallel

    for name in names:
        row = (
            ROWS[int(name)]
            if name.isdigit()
            else Row(f"reference {name}", 1, engine={"micro_batch_tokens": 4096}, model=name)
        )
        keys = [f"parallel.{k}={v}" for k, v in row.parallel.items()] + [
            f"engine.{k}={v}" for k, v in row.engine.items()
        ]
        config = load_config(None, [f"model.path={folder / row.model}", *TRAIN, *keys])
        engine = build_engine(config, optimizer_steps=sum(STEPS), temperature=TEMPERATURE)
        result = {mode: measure(engine, config, mode) for mode in MODES}
        result["R3"] |= train_steps(engine, config)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{row.name}.pt")
        dist.barrier()
    destroy_parallel()


def measure(engine: Any, config: Any, mode: str) -> dict[str, Any]:
    """Log-probabilities (of all responses, in order), loss and
    gradients (as Hugging Face tensors) of one mini-batch, on rank 0.
    """
    import torch
    import torch.distributed as dist

    from megarl.loop.learn import Learner

    config = config.model_copy(deep=True)
    config.replay.mode, config.batch.minibatches = mode, 2  # two: with its own pi_old pass
    learner = Learner(config, engine)
    packs = lay_out(engine, config, with_routes=mode == "R3")
    parallel = engine.model.parallel
    replay_old = {"none": "record", "R2": "record", "R3": "replay"}[mode]
    scored = engine.logprobs(packs, replay_old)
    local = {}
    for pack, (logprobs, _) in zip(packs, scored, strict=False):
        # pi_old is not pi: a fixed change that depends on the token only makes every branch of the loss count
        pack.passes.old_logprobs = logprobs + 0.1 * torch.sin(pack.labels.float() + pack.positions.float())
        local |= {i: logprobs[s : s + sum(RESPONSES[i]) - 1] for i, s in zip(pack.responses, pack.starts, strict=True)}
    if mode == "R2":
        for pack in packs:
            pack.passes.old_routes = pack.passes.live_routes
    sums = engine.gradients(packs, {"none": "record", "R2": "replay_old", "R3": "replay"}[mode], learner._loss)
    loss = (
        sum((float(part["loss/value:sum"]) for part in sums), 0.0)
        if parallel.coord.tp == parallel.coord.cp == 0
        else 0.0
    )
    if config.engine.distributed_optimizer:
        gather_shards(engine)
    everyone: list[Any] = [None] * parallel.layout.world
    dist.all_gather_object(everyone, (local, loss))
    logprobs = {k: v for rank in everyone for k, v in rank[0].items()}
    return {
        "logprobs": torch.cat([logprobs[i] for i in sorted(logprobs)]),
        "loss": torch.tensor(sum(rank[1] for rank in everyone)),
        "grad": whole_tensors(engine, lambda tensor: tensor.main_grad),
    }


def train_steps(engine: Any, config: Any) -> dict[str, Any]:
    """Whole steps of the learner under R3: every metric but times; by how much each parameter has changed; and what of
    that rounding may have done, half a unit in the last place of its largest number at every update.
    """
    import torch

    from megarl.loop.batch import Batch
    from megarl.loop.learn import Learner

    config = config.model_copy(deep=True)
    config.replay.mode = "R3" if engine.model.weight_map.moe_layers else "none"
    learner = Learner(config, engine)
    before = whole_tensors(engine, lambda tensor: tensor.detach())
    metrics: dict[str, Any] = {}
    for step, count in enumerate(STEPS):
        each = len(RESPONSES) // count
        members = [list(range(i * each, (i + 1) * each)) for i in range(count)]
        minibatches = [lay_out(engine, config, with_routes=True, members=chosen) for chosen in members]
        names, sampled = [str(i) for i in range(len(RESPONSES))], list(range(0, len(RESPONSES), 5))
        batch = Batch(minibatches, names, {}, [], sampled, [[] for _ in RESPONSES])
        learned = learner.learn(batch, step)
        values = {name: value for name, value in learned.metrics.items() if not name.startswith("time/")}
        values["worst tokens"] = [row["difference"] for row in learned.notes.worst]
        values |= {f"old log-probabilities of {i}": value for i, value in learned.notes.sampled.items()}
        metrics |= {f"{step} {name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    after = whole_tensors(engine, lambda tensor: tensor.detach())
    updates = sum(STEPS)
    return {
        "metrics": metrics,
        "update": {name: after[name] - before[name] for name in before},
        "rounding": {name: updates * 2**-24 * float(tensor.abs().max()) for name, tensor in after.items()},
    }


def lay_out(engine: Any, config: Any, with_routes: bool, members: list[int] | None = None) -> list[Any]:
    """This rank's packs of the fixed responses, or of some: the trainer's own
    assignment, arrays and, for R3, adversarial routes.
    """
    import torch

    from megarl.engine.batch import assign, make_packs, scatter_rows
    from megarl.engine.build import route_shape
    from megarl.engine.exchange import attach_routes

    parallel, shape = engine.model.parallel, route_shape(engine.model)
    weight_map = engine.model.weight_map
    generator = torch.Generator().manual_seed(3)
    lengths = [p + r for p, r in RESPONSES]
    tokens = [torch.randint(3, 14, (n,), generator=generator) for n in lengths]
    mu = [-torch.rand(r, generator=generator) * 3 for _, r in RESPONSES]
    # Of both signs, but positive in the mean: else the loss is a small difference of large terms and its relative error
    # is of the terms'.
    advantage = torch.randn(len(RESPONSES), generator=generator) + 1
    routes = [
        torch.rand(n - 1, len(weight_map.moe_layers), weight_map.num_experts, generator=generator).argsort(-1)[
            ..., : weight_map.top_k
        ]
        for n in lengths
    ]
    prompts = [p for p, _ in RESPONSES]
    chosen = list(range(len(RESPONSES))) if members is None else members
    rows = [lengths[i] - 1 for i in chosen]
    layout = parallel.layout
    places = assign(rows, layout.dp, config.engine.micro_batch_tokens, layout.packs_multiple)[parallel.coord.dp]
    assigned = [[chosen[place] for place in pack] for pack in places]
    packs = make_packs(assigned, tokens, prompts, layout, parallel.coord)
    for pack in packs:
        responses = pack.responses
        prompt_lens = [prompts[i] for i in responses]
        pack.rollout.logprobs = scatter_rows(pack, [mu[i] for i in responses], prompt_lens)
        pack.rollout.denominators.fill_(len(chosen))
        for start, i in zip(pack.starts, responses, strict=True):
            rows = slice(start, start + lengths[i] - 1)
            pack.rollout.rewards[rows] = pack.rollout.advantages[rows] = advantage[i]
            pack.rollout.group_ids[rows] = i // 3
        if with_routes and weight_map.moe_layers:
            empty = torch.zeros(0, len(weight_map.moe_layers), weight_map.top_k)
            attach_routes(pack, torch.cat([routes[i] for i in responses]) if responses else empty, parallel, shape)
    return packs


def whole_tensors(engine: Any, part: Callable[[Any], Any]) -> dict[str, Any]:
    """Hugging Face tensors put together from part(parameter) of the ranks that are the first to hold one; on every
    rank. Collective.
    """
    import torch
    import torch.distributed as dist

    local = [
        (piece, part(tensor)[piece.local.slices].clone())
        for param, tensor in engine.model.params()
        if param.replica == 0 and not param.buffer
        for piece in param.pieces
    ]
    everyone: list[Any] = [None] * engine.model.parallel.layout.world
    dist.all_gather_object(everyone, local)
    full = {name: torch.zeros(shape) for name, shape in engine.model.weight_map.hf_shapes.items()}
    for piece, value in (pair for pieces in everyone for pair in pieces):
        full[piece.hf_name][piece.rect.slices] = value
    return full


def gather_shards(engine: Any) -> None:
    """With the distributed optimizer each rank has reduced only its
    shard of every gradient bucket: brings the shards together.
    """
    import torch.distributed as dist
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    for chunk in engine.model.chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            peers = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = shard_buffer(bucket.grad_data, peers.size())[peers.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=peers)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2:])
