"""The exchange of responses moves host memory: one operation, over the host group, whatever the ranks compute on."""

from __future__ import annotations

import ast
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl import train as train_module
from megarl.config import load_config
from megarl.engine import exchange, parallel
from megarl.engine.batch import Meta, assign
from megarl.engine.device import CPU, Device
from megarl.engine.exchange import RouteShape
from megarl.engine.parallel import Parallel
from megarl.loop import sampler
from megarl.loop.refit import Refit
from megarl.rollout import fleet as fleet_module
from megarl.rollout.fleet import Fleet
from megarl.rollout.registry import RolloutError
from megarl.rollout.response import Response
from megarl.weights.map.layout import Layout

GPU, WAIT = Device(torch.device("cuda", 0), "nccl"), timedelta(seconds=1)


@pytest.mark.parametrize("me", range(4))
def test_two_owners_send_in_one_operation_from_host_memory(me: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Receives posted one by one before sends wait for each other under NCCL. Ranks 0 and 2 own responses."""
    messages = {owner: {rank: bytes([owner, rank]) * (owner + rank) for rank in range(4)} for owner in (0, 2)}
    layout, group = Layout(tp=1, pp=1, vpp=1, ep=1, etp=1, cp=1, world=4), object()

    def all_to_all(out: Tensor, given: Tensor, receives: list[int], sends: list[int], group: Any) -> None:
        assert group is at.host_group and out.device == given.device == CPU
        assert sends == [len(messages.get(me, {}).get(rank, b"")) if rank != me else 0 for rank in range(4)]
        mine = messages.get(me, {})
        assert bytes(given.numpy()) == b"".join(mine[rank] for rank in mine if rank != me)
        came = b"".join(messages[owner][me] for owner in (0, 2) if owner != me)
        assert sum(receives) == len(came)
        out.copy_(torch.frombuffer(bytearray(came), dtype=torch.uint8))

    monkeypatch.setattr(exchange.dist, "all_to_all_single", all_to_all)
    at = Parallel(layout, layout.coord(me), GPU, group)  # type: ignore[arg-type]
    sizes = {owner: len(messages[owner][me]) for owner in (0, 2)}
    assert exchange._swap(messages.get(me, {}), sizes, at) == {
        owner: messages[owner][me] for owner in (0, 2) if sizes[owner] or owner == me
    }


def test_who_asks_nobody_waits_for_rollouts_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's kernel would wait on the GPU, which a colocated server decodes on."""
    at = Parallel(Layout(), Layout().coord(0), GPU, object())  # type: ignore[arg-type]

    def all_reduce(given: Tensor, op: Any, group: Any) -> None:
        assert group is at.host_group and given.device == CPU
        given.fill_(7)

    monkeypatch.setattr(sampler.dist, "all_reduce", all_reduce)
    asks: Any = SimpleNamespace(parallel=at)
    assert sampler.Sampler._largest(asks, 3) == 7


OBJECTS = {"barrier", "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"}


def test_what_lies_in_host_memory_meets_in_a_group_that_is_named() -> None:
    """The default group is NCCL's on a GPU: a rank that waits there for another's word holds a GPU that it shares."""
    unnamed = []
    for path in Path(exchange.__file__).parents[1].rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            owner, _, name = ast.unparse(call.func).rpartition(".")
            if owner == "dist" and name in OBJECTS and "group" not in {given.arg for given in call.keywords}:
                unnamed.append(f"{path}:{call.lineno}")
    assert not unnamed


def test_ranks_meet_over_servers_in_the_host_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of Fleet, and the canary that rank 0 has of the servers."""
    hosts, met, told = object(), list[str](), list[Any]()

    def meets(name: str) -> Callable[..., None]:
        def meet(given: Any = None, *, group: Any, src: int = 0) -> None:
            assert group is hosts and (not isinstance(given, Tensor) or given.device == CPU), name
            met.append(name)
            if told:
                given[:] = [told.pop()]

        return meet

    for name in ("broadcast_object_list", "all_reduce", "barrier"):
        monkeypatch.setattr(dist, name, meets(name))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(fleet_module, "idle", lambda device: None)
    fleet = Fleet.__new__(Fleet)
    fleet.workers, fleet._device, fleet._hosts = [], GPU.device, hosts  # type: ignore[assignment]
    fleet._count(True)
    fleet.check()
    fleet.figures()
    fleet.turn("sleep")
    told.append(RolloutError("a server is gone"))
    with pytest.raises(RolloutError, match="is gone"):
        fleet._settled(lambda: None)
    at = Parallel(Layout(), Layout().coord(0), GPU, hosts)  # type: ignore[arg-type]
    refit: Any = SimpleNamespace(engine=SimpleNamespace(model=SimpleNamespace(parallel=at)))
    assert Refit._compare_canary(refit, []) == []
    once = ["all_reduce", "broadcast_object_list", "all_reduce", "barrier", "barrier"]
    assert met == [*once, "broadcast_object_list", "barrier", "broadcast_object_list"]


def test_the_loop_hands_its_host_group_to_the_fleet(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = object()

    def connect(*_: Any, **given: Any) -> Any:
        raise InterruptedError(given["hosts"] is hosts)

    at = Parallel(Layout(), Layout().coord(0), Device(CPU, "gloo"), hosts)  # type: ignore[arg-type]
    for name in ("StallWatch", "build_engine", "resume", "MemoryTurns", "Output"):
        monkeypatch.setattr(train_module, name, lambda *_, **__: None)
    monkeypatch.setattr(train_module, "join_ranks", lambda config: at)
    monkeypatch.setattr(train_module, "Learner", lambda *_: SimpleNamespace(critic=None))
    with pytest.raises(InterruptedError, match="True"):
        train_module.train(load_config(run_yaml, []), connect)


def test_an_owner_looks_only_for_what_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 ranks in a layout of a 235B model, 1024 responses, 32 of them here: a share is two runs of rows at most, one
    for each rank of a replica that sees other rows. Packs without one of them are not laid out.
    """
    layout, rows = Layout(tp=4, pp=4, vpp=1, ep=16, etp=1, cp=2, world=256), 24
    metas = [Meta(i, 4, rows + 1, 0.0, 0, i // 32 * 8, has_routes=True, truncated=False) for i in range(1024)]
    at = Parallel(layout, layout.coord(0), Device(CPU, "gloo"), None)
    shape = RouteShape(tuple((2 * stage, 2 * stage + 1) for stage in range(4)), num_experts=16, top_k=2)
    routes = np.zeros((rows, 8, 2), np.uint8)
    tokens, logprobs = np.zeros(rows + 1, np.int32), np.zeros(rows - 3, np.float32)
    mine = {i: Response(tokens, 4, logprobs, routes, [], "stop") for i, meta in enumerate(metas) if not meta.owner}
    packs = assign([meta.rows for meta in metas], layout.dp, 4 * rows)
    made, messages, share = [], dict[int, bytes](), exchange._Share
    laid_out, rows_of = list[int](), exchange.router_rows

    def swap(outgoing: dict[int, bytes], *given: Any) -> dict[int, bytes]:
        messages.update(outgoing)
        raise StopIteration

    monkeypatch.setattr(exchange, "_Share", lambda *given: made.append(given) or share(*given))
    monkeypatch.setattr(exchange, "router_rows", lambda length, *at: laid_out.append(length) or rows_of(length, *at))
    monkeypatch.setattr(exchange, "_swap", swap)
    with pytest.raises(StopIteration):
        exchange.exchange(packs, metas, None, mine, at, shape)  # type: ignore[arg-type]
    in_replica = sum(map(len, packs[0]))
    assert len(made) <= 2 * (in_replica + len(mine) * layout.tp * layout.cp)
    with_mine = sum(any(i in mine for i in pack) for replica in packs for pack in replica)
    assert len(laid_out) <= len(packs[0]) + with_mine * layout.tp * layout.cp
    sent = len(mine) * (4 * layout.tp * layout.cp * layout.pp * (2 * rows - 2) + routes.nbytes)
    assert sum(map(len, messages.values())) == sent


def test_of_a_pack_of_several_owners_each_sends_its_own() -> None:
    layout, rows, prompt_len = Layout(tp=2, pp=2, world=8), 6, 4
    shape = RouteShape(((0,), (1,)), num_experts=16, top_k=2)
    metas = [Meta(i, prompt_len, rows + 1, 0.0, 0, i % 2 * 4, has_routes=True, truncated=False) for i in range(4)]
    routes = np.zeros((rows, 2, 2), np.uint8)
    response = Response(
        np.zeros(rows + 1, np.int32), prompt_len, np.zeros(rows + 1 - prompt_len, np.float32), routes, [], "stop"
    )
    for owner in (0, 4):
        own = {i: response for i, meta in enumerate(metas) if meta.owner == owner}
        sent = exchange._outgoing([[[0, 1]], [[2, 3]]], metas, own, layout, shape)
        for dp in range(2):
            to = [len(sent[rank]) for rank in range(8) if layout.coord(rank).dp == dp]
            assert sum(to) == 4 * 4 * (2 * (rows + 1) - prompt_len) + routes.nbytes  # one response to four ranks


def test_a_gpu_has_a_host_group_beside_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(parallel.dist, "new_group", lambda **asked: made.append(asked) or len(made))
    assert parallel._host_group(Device(CPU, "gloo"), WAIT) is None and not made
    monkeypatch.setattr(parallel, "_host", (None, None))
    monkeypatch.setattr(parallel.dist, "group", type("group", (), {"WORLD": "world"}))
    assert parallel._host_group(GPU, WAIT) == parallel._host_group(GPU, WAIT) == 1
    assert [asked["backend"] for asked in made] == ["gloo"]
