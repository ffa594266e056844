"""Checks that run inside torchrun ranks: `ranks.py MODEL CHECK...`. A check raises where it fails."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megarl.config import CANARY_TOKENS, load_config
from megarl.engine.adam_state import parts_of
from megarl.engine.batch import Meta, Pack, make_packs, router_rows
from megarl.engine.build import build_engine, route_shape
from megarl.engine.checkpoint import begin_checkpoint, load_checkpoint, save_checkpoint
from megarl.engine.exchange import LossInputs, exchange, gather_metas
from megarl.engine.parallel import destroy_parallel
from megarl.engine.step import Engine, Routes, TokenScores
from megarl.errors import Stopped, UserError
from megarl.loop.own_score import OwnScore
from megarl.loop.reduce import reduce_sums
from megarl.rollout.response import Response
from megarl.rollout.sync_leader import Canary
from megarl.weights.files.hf_reader import HfReader

LAYOUT = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]
LAYOUTS = (
    LAYOUT,
    ["parallel.pp=2", "parallel.vpp=2", "parallel.tp=2"],
    ["parallel.tp=2", "parallel.etp=2"],
    ["parallel.ep=4"],
)

PADDING = 4096  # bytes


def layout_of_megatron(model: str) -> None:
    """Our arithmetic of ranks is megatron-core's."""
    from megatron.core import parallel_state as ps

    for keys in (
        LAYOUT,
        ["parallel.tp=2", "parallel.cp=2"],
        ["parallel.tp=2", "parallel.etp=2"],
        ["parallel.pp=2", "parallel.ep=2"],
    ):
        at = build_engine(load_config(None, [f"model.path={model}", *keys])).model.parallel.coord
        assert (at.tp, at.pp) == (ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank())
        assert (at.cp, at.dp) == (ps.get_context_parallel_rank(), ps.get_data_parallel_rank())
        assert (at.etp, at.ep) == (ps.get_expert_tensor_parallel_rank(), ps.get_expert_model_parallel_rank())
        assert at.edp == ps.get_expert_data_parallel_rank()


def gathered_weights(model: str) -> None:
    """Loaded in a layout and gathered at rank 0, the weights are
    bitwise those of the folder, in several small buckets too.
    """
    from megarl.weights.reshard.gather import gather_full, plan_gather

    for keys in (LAYOUT, ["parallel.tp=2", "parallel.etp=2", "parallel.pp=2"], ["parallel.ep=4"]):
        built = build_engine(load_config(None, [f"model.path={model}", *keys])).model
        shapes = built.weight_map.hf_shapes
        plan = plan_gather(built.weight_map, built.parallel.layout)
        full = dict(
            gather_full(plan, built.weight_map, built.params(), dist.get_rank(), torch.float32, bucket_bytes=50_000)
        )
        if dist.get_rank() == 0:
            with HfReader(model) as reader:
                for name in shapes:
                    assert torch.equal(full[name], reader.whole(name)), name
        else:
            assert not full


def quantized_shards(model: str) -> None:
    """Shards quantised in place, row maxima reduced over TP and ETP,
    are bitwise the quantised full tensors; afterwards nothing is left.
    """
    from megarl.weights.reshard.gather import gather_full, plan_gather
    from megarl.weights.reshard.quantize import fake_quantize, is_quantized, quantized_weights

    for keys in (LAYOUT, ["parallel.tp=2", "parallel.etp=2", "parallel.pp=2"]):
        built = build_engine(load_config(None, [f"model.path={model}", *keys])).model
        at, shapes = built.parallel, built.weight_map.hf_shapes
        plan = plan_gather(built.weight_map, at.layout)
        before = [tensor.detach().clone() for _, tensor in built.params()]
        for mode in ("fp8_e4m3", "int4"):
            with quantized_weights(built.params(), shapes, mode, ["router"], at.tp_group, at.etp_group):
                full = dict(gather_full(plan, built.weight_map, built.params(), dist.get_rank(), torch.float32))
            assert all(torch.equal(tensor, was) for (_, tensor), was in zip(built.params(), before))
            with HfReader(model) as reader:
                for name in full:
                    whole = reader.whole(name)
                    if is_quantized(name, shapes[name], ["router"]):
                        whole = fake_quantize(whole, mode)
                    assert torch.equal(full[name], whole), name


def exchanged_rows(model: str) -> None:
    """Each rank receives exactly the rows of its own tokens and layers,
    and those rows are the right ones (docs/routing.md, traps 9 and 11).
    """
    for keys in (LAYOUT, ["parallel.tp=2"], ["parallel.cp=2", "parallel.tp=2"], ["parallel.pp=2"], []):
        engine = build_engine(load_config(None, [f"model.path={model}", *keys]))
        at, shape = engine.model.parallel, route_shape(engine.model)
        everything = {i: _response(i, engine) for i in range(7)}
        owners = [at.ingest_rank(dp) for dp in range(at.layout.dp)]
        held = {i: r for i, r in everything.items() if owners[i % len(owners)] == at.coord.rank}
        for fault, kind in ((Stopped(15), Stopped), ("wrong", UserError)):  # one rank's; all must raise it
            try:
                gather_metas([], at, fault if at.coord.rank == at.layout.world - 1 else None)
            except kind:
                continue
            raise AssertionError(f"rank {at.coord.rank} did not learn of {fault!r}")
        metas = gather_metas([_meta(i, r, at.coord.rank) for i, r in held.items()], at)
        assert [meta.group for meta in metas] == list(range(7))
        members = [[[0, 3], [6]], [[1, 2], [4, 5]]] if at.layout.dp > 1 else [[[0, 3, 6], [1, 2], [4, 5]]]
        members += [[[], []]] * (at.layout.dp - len(members))
        numbers, none = torch.arange(7.0), torch.zeros(7, dtype=torch.bool)
        inputs = LossInputs(numbers, numbers, torch.ones(7), none)
        exchanged = exchange(members, metas, inputs, held, at, shape)
        expected = 0
        for pack in exchanged.packs:
            expected += _check_pack(pack, everything, engine)
        assert exchanged.route_bytes == expected, (exchanged.route_bytes, expected)


def _response(i: int, engine: Engine) -> Response:
    weight_map = engine.model.weight_map
    rng = np.random.default_rng(i)
    length, prompt_len = 5 + 4 * i, 2 + i % 3
    scores = rng.random((length - 1, len(weight_map.moe_layers), weight_map.num_experts))
    routes = scores.argsort(-1)[..., : weight_map.top_k].astype(np.uint8)  # different at every token and layer
    tokens = rng.integers(3, 14, length).astype(np.int32)
    logprobs = -rng.random(length - prompt_len).astype(np.float32)
    return Response(
        tokens, prompt_len, logprobs, routes, [{"version": 0, "start": 0, "end": length - prompt_len}], "stop"
    )


def _meta(i: int, response: Response, owner: int) -> Meta:
    return Meta(i, response.prompt_len, len(response.tokens), float(i), 0, owner, True, False)


def _check_pack(pack: Pack, everything: dict[int, Response], engine: Engine) -> int:
    """Compares a pack with the responses it was made of; returns the
    bytes of routes this rank must have received for it.
    """
    at, shape = engine.model.parallel, route_shape(engine.model)
    layers = list(shape.layers_of_stage[at.coord.pp])
    rows = router_rows(pack.padded, at.layout, at.coord)
    assert pack.rollout.routes is not None and pack.rollout.has_route is not None and pack.rollout.has_route.all()
    count = 0
    for i, start in zip(pack.responses, pack.starts):
        response = everything[i]
        n = len(response.tokens) - 1
        assert pack.tokens[start : start + n].tolist() == response.tokens[:-1].tolist()
        assert pack.rollout.logprobs[start + response.prompt_len - 1 : start + n].tolist() == response.logprobs.tolist()
        assert pack.rollout.advantages[start] == float(i)
        mine = (rows >= start) & (rows < start + n)
        want = torch.from_numpy(response.routes[rows[mine].numpy() - start][:, layers].astype(np.int16))
        assert torch.equal(pack.rollout.routes[mine], want)
        count += int(mine.sum())
    padding = pack.rollout.routes[rows >= pack.rows]
    assert (padding.sort(-1).values.diff(dim=-1) > 0).all()  # distinct experts
    return count * len(layers) * shape.top_k * shape.dtype.itemsize


def reduced_figures(model: str) -> None:
    """Sums and maxima of all ranks, negative ones too, by one all-reduce."""
    parallel = build_engine(load_config(None, [f"model.path={model}", "parallel.ep=4"])).model.parallel
    rank = dist.get_rank()
    given = {"a:sum": rank + 0.5, "a:count": 2.0, "b:max": -1.0 - rank, "c:max": float(rank)}
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as spy:
        reduced = reduce_sums(parallel, {key: torch.tensor(value) for key, value in given.items()})
    assert spy.call_count == 1
    assert {key: float(reduced[key]) for key in given} == {"a:sum": 8.0, "a:count": 8.0, "b:max": -1.0, "c:max": 3.0}


def replay_is_a_no_op(model: str) -> None:
    """R3 of the routes the trainer recorded itself, and R2 of its own
    pi_old pass, change nothing: bitwise, with gradients.
    """
    engine = build_engine(load_config(None, [f"model.path={model}"]), optimizer_steps=1)
    at = engine.model.parallel
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 14, (n,), generator=generator) for n in (9, 17, 5)]

    def run(routes: Any, replayed: Any = None) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        (pack,) = make_packs([[0, 1, 2]], tokens, [2, 3, 1], at.layout, at.coord)
        pack.rollout.routes = replayed
        kept = []

        def loss(
            pack: Pack, logprobs: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            kept.append(logprobs.detach().clone())
            return -(logprobs * pack.mask).sum(), {}

        engine.gradients([pack], routes, loss)
        grads = [tensor.main_grad.clone() for _, tensor in engine.model.params()]
        return kept[0], grads, pack.passes.live_routes

    plain, recorded = run("off"), run("record")
    replayed = run("replay", recorded[2])
    for other in (recorded, replayed):
        assert torch.equal(plain[0], other[0]) and all(torch.equal(a, b) for a, b in zip(plain[1], other[1]))
    flipped = run("replay", recorded[2].flip(-1))  # a set, not a row: docs/routing.md, trap 18
    torch.testing.assert_close(flipped[0], plain[0], atol=1e-5, rtol=1e-5)
    other_routes = run("replay", (recorded[2] + 1) % engine.model.weight_map.num_experts)
    assert (other_routes[0] - plain[0]).abs().max() > 1e-3  # replay does change something where it should
    assert all(router.router_replay is None for _, router in engine.model.routers())  # nothing is left behind


def sums_over_micro_batches(model: str) -> None:
    """The same gradient for 1, 3 and 7 uneven micro-batches, and from a response of one token a gradient at all."""
    engine = build_engine(load_config(None, [f"model.path={model}"]), optimizer_steps=1)
    at = engine.model.parallel
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 14, (n,), generator=generator) for n in (9, 17, 5, 30, 3, 8, 12)]

    def grads(assigned: list[list[int]]) -> torch.Tensor:
        packs = make_packs(assigned, tokens, [2] * 7, at.layout, at.coord)
        engine.gradients(packs, "off", lambda pack, logprobs, entropy: (-(logprobs * pack.mask).sum() / 7, {}))
        return torch.cat([tensor.main_grad.flatten() for _, tensor in engine.model.params()])

    one = grads([list(range(7))])
    for assigned in ([[0, 1, 2], [3], [4, 5, 6]], [[i] for i in range(7)]):
        assert (grads(assigned) - one).abs().max() / one.abs().max() < 1e-5
    assert grads([[4]]).abs().max() > 0


def interleaved_packs(model: str) -> None:
    """PP2 x VPP2, where the next and the previous stage are one rank: every pack's
    log-probabilities are those of a run of its own, and an update over packs of different lengths
    ends, for as many packs as stages and for more, with the gradient of one after the other.
    """
    engine = build_engine(
        load_config(None, [f"model.path={model}", "parallel.pp=2", "parallel.vpp=2"]), optimizer_steps=1
    )
    at = engine.model.parallel
    tokens = [torch.randint(3, 14, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 30, 12, 2, 21, 9)]
    packs = make_packs([[i] for i in range(len(tokens))], tokens, [1] * len(tokens), at.layout, at.coord)
    assert len({pack.padded for pack in packs}) == len(packs)
    together = engine.logprobs(packs, "off")
    for number, pack in enumerate(packs):
        alone = engine.logprobs([pack, pack], "off")
        if at.is_last_stage:
            assert torch.equal(alone[0][0], together[number][0]), number

    def gradient(packs: list[Pack]) -> torch.Tensor:
        engine.gradients(
            packs, "off", lambda pack, logprobs, entropy: (-(logprobs * pack.mask).sum() / len(tokens), {})
        )
        return torch.cat([tensor.main_grad.flatten() for _, tensor in engine.model.params()])

    pairs = [gradient(packs[i : i + 2]) for i in range(0, len(packs), 2)]
    torch.testing.assert_close(gradient(packs), torch.stack(pairs).sum(0), rtol=1e-5, atol=1e-6)


def resume_is_exact(model: str) -> None:
    """Two updates, a checkpoint that is written during a third: a fresh engine that
    loads the checkpoint does the third update bitwise the same.
    """
    folder = [Path(tempfile.mkdtemp()) if dist.is_initialized() is False or dist.get_rank() == 0 else None]
    for number, keys in enumerate(
        ([], ["engine.distributed_optimizer=true"], LAYOUT, [*LAYOUT, "engine.distributed_optimizer=true"])
    ):
        config = load_config(None, [f"model.path={model}", "train.lr=1e-3", "train.lr_decay_style=linear", *keys])
        engine = build_engine(config, optimizer_steps=10)
        dist.broadcast_object_list(folder, src=0)
        assert folder[0] is not None
        path = folder[0] / str(number)
        norms = [_update(engine, step) for step in range(2)]
        writing = begin_checkpoint(engine, path, 2, {"optimizer_steps": 2}, keep=1)
        norms.append(_update(engine, 2))
        writing.finish()
        want = [tensor.detach().clone() for _, tensor in engine.model.params()]
        again = build_engine(config, optimizer_steps=10)
        assert load_checkpoint(again, path / "step_2")["optimizer_steps"] == 2
        assert _update(again, 2) == norms[2], keys
        assert all(torch.equal(a, tensor) for a, (_, tensor) in zip(want, again.model.params())), keys


def _update(engine: Engine, step: int) -> dict[str, float]:
    at = engine.model.parallel
    generator = torch.Generator().manual_seed(step)
    tokens = [torch.randint(3, 14, (12,), generator=generator) for _ in range(4)]
    members = [[0, 1], [2, 3]] if at.coord.dp == 0 else [[1, 3], [0, 2]]
    packs = make_packs(members, tokens, [2] * 4, at.layout, at.coord)
    return engine.update(packs, "off", lambda pack, logprobs, entropy: (-(logprobs * pack.mask).sum() / 4, {}))[1]


def converted_checkpoints(model: str) -> None:
    """A run's checkpoint of any layout fills a model of any other and
    converts to its very weights; megatron-core loads a converted one.
    """
    from megatron.core import dist_checkpointing

    from megarl.convert.commands import hf_to_megatron_main, megatron_to_hf_main
    from megarl.engine.checkpoint import _key, _sharded
    from megarl.engine.export import export_hf

    folder = [Path(tempfile.mkdtemp())] if dist.is_initialized() is False or dist.get_rank() == 0 else [Path()]
    path, source = model, Path(model)
    for number, keys in enumerate(LAYOUTS):
        engine = build_engine(load_config(None, [f"model.path={path}", "train.lr=1e-2", *keys]), optimizer_steps=1)
        dist.broadcast_object_list(folder, src=0)
        here = folder[0] / str(number)
        export_hf(engine.model, path, here / "read")
        _update(engine, number)
        saved = save_checkpoint(engine, here, 1, {"optimizer_steps": 1}, keep=1)
        export_hf(engine.model, path, here / "saved", shard_bytes=500_000)
        if dist.get_rank() == 0:
            assert megatron_to_hf_main(["--megatron", str(saved), "--out", str(here / "converted"), "--verify"]) == 0
            _assert_folders_equal(source, here / "read")
            _assert_folders_equal(here / "saved", here / "converted")
            sizes = [
                f"--{key.removeprefix('parallel.').replace('=', ' ')}"
                for key in LAYOUTS[number - 1]
                if "vpp" not in key
            ]
            options = " ".join(["--hf", str(here / "saved"), "--out", str(here / "megatron"), *sizes]).split()
            assert hf_to_megatron_main(options) == 0
        dist.barrier()
        sharded = {key: value for key, value in _sharded(engine, loading=False).items() if key != "optimizer"}
        sharded = {key: {n: t for n, t in value.items() if "_extra_state" not in n} for key, value in sharded.items()}
        loaded = dist_checkpointing.load(sharded, str(here / "megatron"))
        for i, chunk in enumerate(engine.model.bare):
            for name, tensor in chunk.named_parameters():
                assert torch.equal(loaded[_key(engine, i)][name], tensor), (keys, name)
        path, source = str(saved), here / "saved"


def _assert_folders_equal(a: Path, b: Path) -> None:
    from safetensors.torch import load_file

    want, found = ({k: t for file in x.glob("*.safetensors") for k, t in load_file(file).items()} for x in (a, b))
    assert want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want), (a, b)


def planned_memory(model: str) -> None:
    """`megarl plan`'s bytes of parameters, gradients and optimizer are those that ranks hold after an update.

    Megatron's buffers and the distributed optimizer's shards are padded: at most PADDING bytes more in each.
    """
    from megarl.estimate.memory import Training, stage_memory

    sharded = "engine.distributed_optimizer=true"
    for keys in (
        LAYOUT,
        [*LAYOUT, "engine.dtype=bfloat16"],
        [*LAYOUT, sharded],
        [sharded, "engine.dtype=bfloat16", "parallel.ep=2"],
    ):
        config = load_config(None, [f"model.path={model}", *keys])
        engine = build_engine(config, optimizer_steps=1)
        _update(engine, 0)
        at, itemsize = engine.model.parallel, 2 if config.engine.dtype == "bfloat16" else 4
        training = Training(at.layout, itemsize, config.engine.distributed_optimizer, "none", 64)
        planned = stage_memory(engine.model.weight_map, training, at.coord.pp)
        assert held_parameters(engine) == planned.parameters, keys
        assert 0 <= held_gradients(engine) - planned.gradients <= PADDING, keys
        difference = held_optimizer(engine) - planned.optimizer
        everyone = [torch.zeros(()) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, torch.tensor(float(difference)))
        if (
            config.engine.distributed_optimizer
        ):  # shards are cut anywhere: a rank may hold less than its share, all together do not
            assert 0 <= sum(everyone) <= PADDING * len(everyone) and max(map(abs, everyone)) <= PADDING, (
                keys,
                everyone,
            )
        else:
            assert not any(everyone), (keys, everyone)


def canary_of_servers(model: str) -> None:
    """The trainer's score of the canary holds for every server that took its routes, in one pass; all that took others
    are compared along theirs, in a second one.
    """
    for keys in (*LAYOUTS, ["parallel.tp=2", "parallel.cp=2"]):
        engine = build_engine(load_config(None, [f"model.path={model}", *keys]))
        own = OwnScore(engine, route_shape(engine.model), 3 * CANARY_TOKENS)
        passes: list[str] = []
        original = engine.logprobs

        def logprobs(packs: list[Pack], routes: Routes, temperature: float | None = None) -> list[TokenScores]:
            passes.append(routes)  # noqa: B023
            return original(packs, routes, temperature)  # noqa: B023

        engine.logprobs = logprobs  # type: ignore[method-assign]
        own.take()
        live = _routes_of_all_ranks(engine, own)
        ours = _from_last_stage(own._logprobs)
        same = Canary(ours, live)
        assert [spread.largest for spread in own.spreads([("a", same), ("b", same)])] == [0, 0], keys
        assert passes == ["record"], keys
        others = [((live.astype(int) + shift) % 8).astype(np.uint8) for shift in range(1, 5)]
        servers = [("a", same), *(("b", Canary(ours, other)) for other in others)]
        first = own.spreads(servers)
        assert passes == ["record", "replay"] and first[0].largest == 0, keys
        assert all(spread.largest > 1e-3 for spread in first[1:]), keys
        alone = [own.spreads([server])[0] for server in servers[1:]]
        assert np.allclose(alone, first[1:], atol=1e-5), keys
        del engine.logprobs


def _routes_of_all_ranks(engine: Engine, own: OwnScore) -> np.ndarray:
    """uint8 [T-1, MoE layers, K]: what the pass of own.take() chose."""
    at, shape = engine.model.parallel, route_shape(engine.model)
    (pack,) = own._packs([1])
    rows, live = router_rows(pack.padded, at.layout, at.coord), own._live_routes
    assert live is not None
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (rows.numpy(), list(shape.layers_of_stage[at.coord.pp]), live.numpy()))
    full = np.zeros((pack.padded, len(engine.model.weight_map.moe_layers), live.shape[-1]), np.uint8)
    for rows_of, layers, routes in parts:
        full[np.ix_(rows_of, layers)] = routes
    return full[: pack.rows]


def _from_last_stage(logprobs: torch.Tensor | None) -> np.ndarray:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, logprobs)
    return next(part for part in parts if part is not None).numpy()


def held_parameters(engine: Engine) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in engine.model.params())


def held_gradients(engine: Engine) -> int:
    buffers = [buffer for chunk in engine.model.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers)


def held_optimizer(engine: Engine) -> int:
    """Moments, and what the optimizer steps on where that is a copy of
    its own. Without the count of steps, a scalar a tensor.
    """
    weights = {tensor.untyped_storage().data_ptr() for _, tensor in engine.model.params()}
    total = 0
    for part in parts_of(engine.optimizer):
        for group in part.optimizer.param_groups:
            for tensor in group["params"]:
                state = part.optimizer.state[tensor]
                own = () if tensor.untyped_storage().data_ptr() in weights else (tensor,)
                total += sum(
                    each.numel() * each.element_size() for each in (state["exp_avg"], state["exp_avg_sq"], *own)
                )
    return total


CHECKS = {check.__name__: check for check in (layout_of_megatron, gathered_weights, quantized_shards, exchanged_rows)}
CHECKS |= {
    check.__name__: check
    for check in (
        reduced_figures,
        replay_is_a_no_op,
        sums_over_micro_batches,
        interleaved_packs,
        resume_is_exact,
        converted_checkpoints,
        planned_memory,
        canary_of_servers,
    )
}

if __name__ == "__main__":
    for name in sys.argv[2:]:
        CHECKS[name](sys.argv[1])
        if dist.get_rank() == 0:
            print(f"ok {name}", flush=True)
    destroy_parallel()
