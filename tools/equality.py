"""The equality table: whatever the layout, the trainer computes the same thing.

    python tools/equality.py [--quick] [--json FILE] [--write docs/equality.md]

For every layout and every replay mode, log-probabilities, loss and gradient of one mini-batch are
compared with those of a single rank that runs one micro-batch. R3 replays adversarial routes that
differ at every token. Under R3 whole training steps follow: three Adam updates with clipping by the
learner, whose metrics and whose change of every parameter are compared too. The figure is
max |a - b| / max |b|, the worst over all tensors; the limit is 1e-5 in float32. Ranks are real
processes over gloo, one launch for each world size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LIMIT = 1e-5
MODES = ("none", "R2", "R3")
TEMPERATURE = 0.9
# (prompt, response) tokens of the mini-batch: uneven, a response of one token, one that is longer than a small
# micro-batch
RESPONSES = [(4, 9), (4, 1), (4, 20), (7, 3), (7, 12), (7, 30), (2, 5), (2, 16), (2, 2), (9, 8), (9, 1), (9, 40)]


@dataclass(frozen=True)
class Row:
    """One layout. `model` names a checkpoint of MODELS; keys are configuration overrides."""

    name: str
    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    model: str = "moe"
    quick: bool = False


# The first step has two mini-batches after a pi_old pass, the second one whose own pass is pi_old. Adam's epsilon is
# of the size of the gradients: where it is tiny, the sign of a gradient that is rounding alone decides an update.
STEPS = (2, 1)
TRAIN = ["train.lr=1e-2", "train.adam_eps=1e-3", "train.clip_grad=0.5", "replay.metrics=true"]
SMALL = {"micro_batch_tokens": 48}  # several micro-batches of different lengths
MODELS = {  # arguments of make_tiny_model; the default family is Qwen3-MoE
    "moe": {"vocab_size": 33},  # padded under TP
    "dense_first": {"dense_layers": [0]},
    "deepseek": {
        "family": "deepseek_v3",
        "top_k": 4,
        "vocab_size": 33,
    },  # latent attention, expert bias, 2 of 4 groups, shared expert, dense first layer
    "qwen2": {"family": "qwen2_moe", "kv_heads": 4},  # QKV bias, a shared expert behind a gate
    "llama": {"family": "llama"},  # no experts
    "deep": {"layers": 8},
}
ROWS = [
    Row("1 rank, several micro-batches", 1, engine=SMALL, quick=True),
    Row("1 rank, sequential experts", 1, engine={"experts": "sequential", **SMALL}, quick=True),
    Row("1 rank, selective recompute", 1, engine={"recompute": "selective"}),
    Row("1 rank, full recompute", 1, engine={"recompute": "full", **SMALL}, quick=True),
    Row("1 rank, dense first layer", 1, engine=SMALL, model="dense_first"),
    Row("TP2", 2, {"tp": 2}, SMALL),
    Row("TP2 EP2", 2, {"tp": 2, "ep": 2}, SMALL, quick=True),
    Row("TP2 ETP2", 2, {"tp": 2, "etp": 2}, SMALL, quick=True),
    Row("TP2 EP1 ETP1", 2, {"tp": 2, "ep": 1, "etp": 1}, {"recompute": "full", **SMALL}, quick=True),
    Row("PP2", 2, {"pp": 2}, SMALL),
    Row("PP2 full recompute", 2, {"pp": 2}, {"recompute": "full", **SMALL}, quick=True),
    Row("PP2 dense first layer", 2, {"pp": 2}, SMALL, model="dense_first"),
    Row("PP2 VPP2", 2, {"pp": 2, "vpp": 2}, SMALL),
    Row("PP2 VPP2 full recompute", 2, {"pp": 2, "vpp": 2}, {"recompute": "full", **SMALL}, quick=True),
    Row("DP2", 2, {}, SMALL, quick=True),
    Row("DP2 distributed optimizer", 2, {}, {"distributed_optimizer": True, **SMALL}),
    Row("EP2", 2, {"ep": 2}, SMALL, quick=True),
    Row("EP2 dense first layer", 2, {"ep": 2}, SMALL, model="dense_first"),
    Row("CP2", 2, {"cp": 2}, SMALL, quick=True),
    Row("PP2 uneven (1 + 3 layers)", 2, {"pp": 2, "first_stage_layers": 1}, SMALL),
    Row("PP2 uneven, dense first layer", 2, {"pp": 2, "first_stage_layers": 3}, SMALL, model="dense_first", quick=True),
    Row("TP2 CP2 EP2", 4, {"tp": 2, "cp": 2, "ep": 2}, SMALL, quick=True),
    Row("TP2 CP2 EP2 full recompute", 4, {"tp": 2, "cp": 2, "ep": 2}, {"recompute": "full", **SMALL}),
    Row("PP2 CP2", 4, {"pp": 2, "cp": 2}, SMALL),
    Row("CP4", 4, {"cp": 4}, SMALL),
    Row("TP2 PP2 VPP2 EP2", 4, {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}, SMALL),
    Row("CP2 DP2 distributed optimizer", 4, {"cp": 2}, {"distributed_optimizer": True, **SMALL}),
    Row("TP2 PP2 EP2", 4, {"tp": 2, "pp": 2, "ep": 2}, SMALL, quick=True),
    Row("TP2 PP2 EP2 full recompute", 4, {"tp": 2, "pp": 2, "ep": 2}, {"recompute": "full", **SMALL}),
    Row("TP2 PP2 ETP2", 4, {"tp": 2, "pp": 2, "etp": 2}, SMALL),
    Row("TP2 EP2 DP2", 4, {"tp": 2, "ep": 2}, SMALL),
    Row("TP2 EP4 DP2", 4, {"tp": 2, "ep": 4}, SMALL, quick=True),
    Row("PP2 EP2 DP2", 4, {"pp": 2, "ep": 2}, SMALL),
    Row("PP4", 4, {"pp": 4}, SMALL),
    Row("PP4 VPP2, 8 layers", 4, {"pp": 4, "vpp": 2}, SMALL, model="deep"),
    Row(
        "DeepSeek, TP2 CP2 EP2 full recompute",
        4,
        {"tp": 2, "cp": 2, "ep": 2},
        {"recompute": "full", **SMALL},
        model="deepseek",
    ),
    Row(
        "DeepSeek, TP2 PP2 EP2, first stage all dense",
        4,
        {"tp": 2, "pp": 2, "ep": 2, "first_stage_layers": 1},
        SMALL,
        model="deepseek",
        quick=True,
    ),
    Row(
        "DeepSeek, PP2 VPP2 ETP1 DP2 full recompute",
        4,
        {"pp": 2, "vpp": 2},
        {"recompute": "full", **SMALL},
        model="deepseek",
        quick=True,
    ),
    Row("DeepSeek, PP4, first stage all dense", 4, {"pp": 4}, SMALL, model="deepseek"),
    Row("DeepSeek, PP2 full recompute", 2, {"pp": 2}, {"recompute": "full", **SMALL}, model="deepseek"),
    Row("Qwen2-MoE, TP2 PP2 ETP2", 4, {"tp": 2, "pp": 2, "etp": 2}, SMALL, model="qwen2", quick=True),
    Row("Llama, TP2 PP2", 4, {"tp": 2, "pp": 2}, SMALL, model="llama", quick=True),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the rows that CI runs")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="write the table as markdown")
    args = parser.parse_args()
    rows = [row for row in ROWS if (row.quick or not args.quick) and args.only in row.name]
    results = compare(rows)
    table = render(results)
    print(table)
    if args.write:
        args.write.write_text(PAGE.format(table=table, rows=len(results)), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failed = [
        name for name, modes in results.items() if not all(v <= LIMIT for mode in modes.values() for v in mode.values())
    ]
    if failed:
        print(f"above {LIMIT:g}: {', '.join(failed)}")
    return 1 if failed else 0


PAGE = """# Equality over layouts

Printed by `python tools/equality.py --write docs/equality.md` ({rows} layouts, float32, gloo). Each figure is the largest
|a - b| / max |b| against a single rank with one micro-batch, over log-probabilities, loss and every gradient tensor; the limit is 1e-5.
R3 replays adversarial routes that differ at every token. The last column is of whole training steps under R3, three Adam updates with
clipping: every metric of the learner, and the change of every parameter beyond the rounding of its storage.

{table}
"""


def compare(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """row -> mode -> {logprobs, loss, grad}, under R3 also {metrics, update}: relative differences from the single rank."""
    import torch

    from tools.tiny_model import make_tiny_model

    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        used = [name for name in MODELS if any(row.model == name for row in rows)]
        for name in used:
            arguments = dict(MODELS[name])
            dense = arguments.pop("dense_layers", None)
            make_tiny_model(folder / name, **arguments)
            if dense:
                _make_dense(
                    folder / name, json.loads((folder / name / "config.json").read_text(encoding="utf-8")), dense
                )
        reference = [Row(f"reference {name}", 1, engine={"micro_batch_tokens": 4096}, model=name) for name in used]
        for world in (1, 2, 4):
            chosen = [row for row in (reference if world == 1 else []) + rows if row.world == world]
            if chosen:
                _launch(folder, world, chosen)
        for row in rows:
            want = torch.load(folder / f"reference {row.model}.pt")
            got = torch.load(folder / f"{row.name}.pt")
            rounding = want["R3"].pop("rounding")
            results[row.name] = {
                mode: {
                    key: _difference(got[mode][key], want[mode][key], rounding if key == "update" else {})
                    for key in want[mode]
                }
                for mode in MODES
            }
    return results


def _make_dense(folder: Path, config: dict[str, Any], dense_layers: list[int]) -> None:
    """Replaces the experts of some layers by one dense MLP of `intermediate_size`."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    for layer in dense_layers:
        prefix = f"model.layers.{layer}.mlp."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            tensors[f"{prefix}{name}_proj.weight"] = torch.randn(shape, generator=generator) * 0.08
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "mlp_only_layers": dense_layers}), encoding="utf-8")


def _launch(folder: Path, world: int, rows: list[Row]) -> None:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run(
        [
            *command,
            __file__,
            "--worker",
            str(folder),
            *[str(ROWS.index(row)) if row in ROWS else row.model for row in rows],
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise SystemExit(f"the {world}-rank launch failed:\n{done.stderr[-3000:]}")


def _difference(got: Any, want: Any, rounding: Mapping[str, float] | float = 0.0) -> float:
    """max |a - b| / max |b|: of a tensor, or the worst of a dictionary of tensors. `rounding` is taken off |a - b|."""
    if isinstance(want, dict):
        if got.keys() != want.keys():
            return math.inf
        of = rounding if isinstance(rounding, Mapping) else {}
        return max(_difference(got[name], want[name], of.get(name, 0.0)) for name in want)
    scale, difference = float(want.abs().max()), float((got - want).abs().max())
    allowed = rounding if isinstance(rounding, float) else 0.0
    return math.inf if math.isnan(difference) else max(difference - allowed, 0.0) / (scale or 1.0)


def render(results: dict[str, dict[str, dict[str, float]]]) -> str:
    columns = [(mode, ("logprobs", "loss", "grad")) for mode in MODES] + [("R3", ("metrics", "update"))]
    titles = [*(f"{mode}: log-prob, loss, gradient" for mode in MODES), "steps: metrics, update"]
    lines = ["| layout | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for name, modes in results.items():
        cells = [", ".join(f"{modes[mode][key]:.1e}" for key in keys) for mode, keys in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- inside the ranks


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
        batch = Batch(
            minibatches, [str(i) for i in range(len(RESPONSES))], {}, [], sampled=list(range(0, len(RESPONSES), 5))
        )
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
    multiple = parallel.layout.pp if parallel.layout.vpp > 1 else 1
    prompts = [p for p, _ in RESPONSES]
    chosen = list(range(len(RESPONSES))) if members is None else members
    rows = [lengths[i] - 1 for i in chosen]
    places = assign(rows, parallel.layout.dp, config.engine.micro_batch_tokens, multiple)[parallel.coord.dp]
    assigned = [[chosen[place] for place in pack] for pack in places]
    packs = make_packs(assigned, tokens, prompts, parallel.layout, parallel.coord)
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
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        worker(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
