"""Who serves a run, as its trainer ranks agree: a real store, servers without a model, one rank."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.config import load_config
from megarl.errors import Stopped, UserError
from megarl.rollout import fleet as module
from megarl.rollout import registry, roll_call
from megarl.rollout.client import Server
from megarl.rollout.fleet import Fleet, LeftOut, WorkersLost
from megarl.rollout.registry import RolloutError, WorkerInfo
from megarl.rollout.sync_leader import SyncLeader, SyncSettings
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.reshard import outgoing
from tools.bench.stub_server import StubServer


async def says_version(request: dict[str, Any]) -> tuple[int, list[bytes | memoryview]]:
    if "refuse" in request:
        return 500, [b'{"error": "a bit was flipped"}']
    if "hang" in request:
        await asyncio.sleep(60)
    return 200, [b'{"version": 0}']


class Run:
    """One trainer rank, and servers that register as workers do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = registry.open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
        self.servers: list[StubServer] = []
        where = ("127.0.0.1", self.store.port)
        monkeypatch.setattr(module, "open_run_store", lambda config, spans_hosts: (self.store, where))
        monkeypatch.setattr(module, "ACCOUNT_S", 0.3)
        monkeypatch.setattr(roll_call, "ACCOUNT_S", 0.3)
        self.ended: list[list[int]] = []
        monkeypatch.setattr(module, "request_shutdown", lambda store, workers: self.ended.append(numbers(workers)))

    def join(self, tp: int = 1) -> WorkerInfo:
        self.servers.append(StubServer(says_version))
        index = registry.claim_index(self.store)
        registry.register_worker(self.store, WorkerInfo(index, self.servers[-1].url, tp, 7, "here", f"/log{index}"))
        return WorkerInfo(index, self.servers[-1].url, tp, 7, "here", f"/log{index}")

    def fleet(self, engines: int) -> Fleet:
        keys = [f"rollout.engines={engines}", "rollout.start_timeout_s=1"]
        return Fleet(load_config(None, keys), torch.device("cpu"), is_ingest=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "ranks"), 1), rank=0, world_size=1)
    made = Run(monkeypatch)
    yield made
    for server in made.servers:
        server.close()
    dist.destroy_process_group()


def numbers(workers: list[WorkerInfo]) -> list[int]:
    return [worker.index for worker in workers]


def test_a_step_begins_with_those_that_are_there(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = run.join(), run.join()
    fleet = run.fleet(2)
    fleet.check()
    assert (numbers(fleet.workers), fleet.gather()) == ([0, 1], True)
    fleet.commit(1)
    capfd.readouterr()

    why = "rollout worker 0 (pid 7 on here): the vLLM server ended"
    registry.report_failure(run.store, 0, f"{why}; last lines of /log0:\nTraceback")
    third = run.join()
    fleet.check()
    assert fleet.workers == [second]
    assert capfd.readouterr().out == f"megarl: {why}; its log is /log0; 1 worker left\n"
    assert fleet.gather() and fleet.members == [second, third] and fleet.workers == [second], "it is not asked yet"
    came = f"megarl: rollout worker 2 ({third.url}) has come; it gets the weights at the next sync\n"
    assert capfd.readouterr().out == came
    fleet.commit(2)
    assert fleet.workers == [second, third]
    assert fleet.figures() == {"fleet/workers": 2, "fleet/lost": 1, "fleet/joined": 1, "fleet/asked_again": 0}

    registry.worker_leaves(run.store, 1)
    run.servers[2].close()  # killed, and nobody was left to report it
    fleet.check(ask_all=False)
    assert fleet.workers == [third], "the commit was its answer, a moment ago"
    fleet.check()
    said = capfd.readouterr().out
    assert f"rollout worker 1 ({second.url}) leaves; 1 worker left" in said
    assert f"rollout worker 2 ({third.url}) does not answer; 0 workers left" in said
    assert fleet.workers == [] and fleet.figures()["fleet/lost"] == 1
    with pytest.raises(UserError, match=r"^no rollout worker is left, .*start_timeout_s = 1 s; .*worker 2 .* answer"):
        fleet.gather()
    with pytest.raises(Stopped):
        fleet.gather(lambda: 15)
    fourth = run.join()
    assert fleet.gather() and fleet.members == [fourth]
    fleet.close()
    assert first not in fleet.members


def test_all_ranks_that_ask_share_what_a_server_decodes_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.join()
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.mul_(3))
    fleet = run.fleet(1)
    assert fleet.client is not None and fleet.client.dispatcher._at_once == 256 // 3
    fleet.close()


def test_workers_outlive_trainers_that_may_be_started_again(run: Run) -> None:
    """A rank that lost a peer raises, and ended the workers before torchrun started it again."""
    run.join()
    fleet = run.fleet(1)
    fleet.close(run_is_over=False)
    assert run.ended == []
    fleet.close()
    assert run.ended == [[0]]


def test_a_worker_that_is_cut_differently_is_not_used(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.join()
    fleet = run.fleet(1)
    assert fleet._roll_call is not None
    fleet._roll_call.tp = 1
    run.join(tp=2)
    fleet.gather()
    assert numbers(fleet.members) == [0]
    assert "it is not used: its rollout.tp 2 is not 1" in capfd.readouterr().out
    fleet.close()


def test_a_step_of_a_sync_fails_for_good_only_where_all_are_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of workers and of ranks: these meet first, so that one that stands still is named instead of a server."""
    met: list[int] = []
    monkeypatch.setattr(dist, "barrier", lambda group: met.append(1))
    workers = [run.join(), run.join()]
    fleet = run.fleet(2)
    fleet._grouped = fleet.workers
    refuse, hang = ({"refuse": 1}, 5.0), ({"hang": 1}, 0.3)

    def step(worker: WorkerInfo, body: dict[str, int], seconds: float) -> None:
        Server(worker.url, seconds, "").post("/megarl/sync/load", body)

    with pytest.raises(RolloutError, match="a bit was flipped") as flipped:
        fleet._settled(lambda: step(workers[0], *refuse))
    assert not isinstance(flipped.value, WorkersLost) and fleet._grouped is None
    with pytest.raises(RolloutError, match="no answer within"):
        fleet._settled(lambda: step(workers[0], *hang))
    run.servers[1].close()
    with pytest.raises(WorkersLost, match="a bit was flipped"):  # its echo on another comes first
        fleet._settled(lambda: step(workers[0], *refuse))
    assert len(met) == 3
    fleet.close()


def test_a_new_worker_by_which_a_sync_fails_is_left_out(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """One more on a GPU with too little memory ended the run. One that serves, and a failure of all, still do."""
    first, second = run.join(), run.join()
    fleet = run.fleet(2)
    fleet.gather()
    fleet.commit(1)

    def load(*failing: WorkerInfo) -> None:
        leader = fleet._leader = SyncLeader(
            fleet.members, "127.0.0.1", run.store.port, SyncSettings("reshard", 1, True, 5.0)
        )
        bodies: list[dict[str, Any]] = [{"refuse": 1} if worker in failing else {} for worker in fleet.members]
        fleet._settled(lambda: leader._await(leader._post("load", bodies)))
        fleet._leave_group()

    third = run.join()
    assert fleet.gather() and fleet.members == [first, second, third]
    with pytest.raises(
        LeftOut, match=r"^rollout worker 2 \(\S+\) is not used, .* failed: \S+ .*a bit was flipped; mend"
    ):
        load(third)
    again = run.join()
    assert fleet.gather() and fleet.members == [first, second, again]
    load()
    fleet.commit(2)
    with pytest.raises(RolloutError, match="a bit was flipped") as flipped:
        load(again)
    assert not isinstance(flipped.value, WorkersLost)
    fleet.gather()
    fleet._ask([])
    fleet.leave_out({third.url: "it is no member"})
    with pytest.raises(LeftOut, match="failed: the canary differs .before it: it is no member.; mend"):
        fleet.leave_out({third.url: "it is no member", again.url: "the canary differs"})
    fleet.members = [second]
    fleet.leave_out({second.url: "nobody is left to go on with"})
    assert capfd.readouterr().out.count(" has come; ") == 2
    fleet.close()


def test_a_server_that_hangs_in_a_sync_is_asked_once_more_and_left_out(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A hang costs the sync's time limit and one question; it is a member again once it answers."""
    first, second = run.join(), run.join()
    fleet = run.fleet(2)
    fleet._grouped, hangs, asked = fleet.workers, [0], list[list[int]]()

    def answers(workers: list[WorkerInfo]) -> list[WorkerInfo]:
        asked.append(numbers(workers))
        return [worker for worker in workers if worker.index not in hangs]

    monkeypatch.setattr(roll_call, "answering", answers)
    with pytest.raises(WorkersLost, match="no answer within"):
        fleet._settled(lambda: Server(first.url, 0.3, "").post("/megarl/sync/load", {"hang": 1}))
    assert fleet.gather() and fleet.members == [second] and asked == [[0, 1], [1]]
    fleet.commit(1)
    assert f"rollout worker 0 ({first.url}) does not answer; 1 worker left" in capfd.readouterr().out
    hangs.clear()
    assert fleet.gather() and fleet.members == [first, second]
    fleet.close()


def test_a_server_that_leaves_while_another_hangs_is_no_member(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers would wait for it in the new group, for as long as a sync's time limit."""
    _, second, third = run.join(), run.join(), run.join()
    fleet = run.fleet(3)

    def answers(workers: list[WorkerInfo]) -> list[WorkerInfo]:
        registry.worker_leaves(run.store, second.index)
        return [second, third]

    monkeypatch.setattr(roll_call, "answering", answers)
    assert fleet.gather() and fleet.members == [third]
    fleet.close()


def test_a_server_that_leaves_after_a_sync_failed_is_let_go(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be paused, and is in no other sync: what it had at work waited for rollout.request_timeout_s."""
    leaves, stays, lost = run.join(), run.join(), run.join()
    fleet = run.fleet(3)
    busy, resumed, post = [False, True], list[str](), Server.post

    def counts(self: Server, path: str, *asked: Any) -> bytes:
        if path.endswith("/resume"):
            resumed.append(self.url)
            if busy.pop():
                raise RolloutError("a step of the last weight sync is not done")
        return post(self, path, *asked)

    monkeypatch.setattr(Server, "post", counts)
    run.servers[2].close()
    with pytest.raises(WorkersLost):
        fleet._settled(lambda: Server(lost.url, 5.0, "").post("/megarl/sync/pause", {}))
    registry.worker_leaves(run.store, leaves.index)
    assert fleet.gather() and fleet.members == [stays] and resumed == [leaves.url]
    fleet.commit(1)
    fleet.check()
    assert resumed == [leaves.url] * 2
    registry.worker_leaves(run.store, stays.index)
    fleet.check()
    assert resumed == [leaves.url] * 2, "the whole sync has ended its pause"
    fleet.close()


def test_a_send_that_fails_by_a_mistake_leaves_the_group_too(run: Run) -> None:
    """Whatever its kind: the other ranks and the servers would wait for this one."""
    run.join()
    fleet = run.fleet(1)
    fleet._grouped, aborted = fleet.workers, []
    with pytest.raises(TypeError, match="takes no argument"):
        fleet._settled(lambda: mistaken(fleet.workers, run.store.port, aborted))
    assert fleet._grouped is None and aborted
    fleet.close()


def mistaken(workers: list[WorkerInfo], port: int, aborted: list[int]) -> None:
    def send() -> None:
        raise TypeError("it takes no argument")

    leader = SyncLeader(workers, "127.0.0.1", port, SyncSettings("reshard", 1, False, 5.0))
    leader.push(send, [], lambda: aborted.append(1))


class Lost:
    """A sender whose server is lost after the first bucket, or that makes another mistake there."""

    def __init__(self, kind: type[Exception] = RuntimeError) -> None:
        self.kind = kind

    def send(self, buckets: Iterator[Any]) -> None:
        next(buckets)
        raise self.kind("a server was lost")

    def close(self) -> None: ...


def push_of_rank(rank: int, store: str, hf_config: dict[str, Any], said: Any) -> None:
    """One of two trainer ranks that gather whole tensors on rank 0, in many buckets."""
    given = timedelta(seconds=30)  # waited for in vain where a rank is left behind
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=given)
    outgoing.BUCKET_BYTES = 20_000
    outgoing.gather_full = partial(outgoing.gather_full, bucket_bytes=20_000)
    weight_map, layout = WeightMap(hf_config), Layout(pp=2, world=2)
    params = [(param, torch.zeros(param.shape)) for param in weight_map.params(layout, layout.coord(rank))]
    fleet = object.__new__(Fleet)
    fleet.members, settings = [], SyncSettings("broadcast", 1, False, 5.0)
    if rank == 0:
        leader: Any = SimpleNamespace(settings=settings, failed={}, push=lambda send, *_: send(), close=lambda: None)
        fleet._leader, fleet._sender = leader, Lost()  # type: ignore[assignment]
    try:
        fleet.push(outgoing.WholeTensors(weight_map, layout, torch.float32, rank).buckets(params), [])
    except Exception as error:
        said.put((rank, str(error)))


def test_a_server_lost_in_a_broadcast_leaves_no_trainer_rank_behind(tmp_path: Path, hf_config: dict[str, Any]) -> None:
    """The others send to rank 0 until it has all, whatever became of its own sends."""
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    given = (str(tmp_path / "ranks"), hf_config, said)
    ranks = [context.Process(target=push_of_rank, args=(rank, *given)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        assert sorted(said.get(timeout=60) for _ in ranks) == [(0, "a server was lost"), (1, "a server was lost")]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def sync_of_rank(rank: int, lone: bool, kind: type[Exception], store: str, said: Any) -> None:
    """One of two trainer ranks; what rank 1 sends breaks off. lone: rank 0 learns of it in loaded()."""
    given = timedelta(seconds=30)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=given)
    fleet, log = object.__new__(Fleet), io.StringIO()
    sys.stderr, fleet.members, settings = log, [], SyncSettings("reshard", 2, True, 5.0)

    def fails(*_: Any) -> None:
        raise RolloutError("server: tensor w from rank 1 differs")

    if rank == 0:
        fleet._sender = SimpleNamespace(send=list, close=lambda: None)  # type: ignore[assignment]
        push = (lambda send, *_: send()) if lone else fails
        fleet._leader = SimpleNamespace(  # type: ignore[assignment]
            settings=settings, failed={}, push=push, loaded=fails, close=lambda: None
        )
    else:
        fleet._sender = Lost(kind)  # type: ignore[assignment]
    try:
        fleet.push(iter([]) if rank == 0 else iter([1]), [])  # type: ignore[list-item]
        dist.barrier()  # the trainers' own score, in which all ranks meet
        fleet.loaded()
    except Exception as error:
        said.put((rank, str(error), log.getvalue().count("its part in a weight sync failed: a server was lost\n")))


@pytest.mark.parametrize(("lone", "kind"), [(True, TypeError), (False, RuntimeError)])
def test_a_part_that_fails_beside_rank_0_is_told_of_by_it(tmp_path: Path, lone: bool, kind: type[Exception]) -> None:
    """Rank 1 does not leave the others in the middle: what the server says of it comes first, on every rank. Its own
    error stands in its log.
    """
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    ranks = [
        context.Process(target=sync_of_rank, args=(rank, lone, kind, str(tmp_path / "ranks"), said))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        told = "server: tensor w from rank 1 differs"
        assert sorted(said.get(timeout=60) for _ in ranks) == [(0, told, 0), (1, told, 1)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def test_what_a_silent_worker_has_at_work_goes_to_others_without_a_step(run: Run) -> None:
    """The watching thread's part; the step that would agree on it waits for this very answer."""
    run.join(), run.join()
    fleet = run.fleet(2)
    told: list[tuple[str, str]] = []
    assert fleet.client is not None
    fleet.client.dispatcher.drop = lambda why: told.extend(why.items())  # type: ignore[method-assign]
    fleet.client.dispatcher.retire = lambda url: told.append((url, ""))  # type: ignore[method-assign]
    registry.report_failure(run.store, 0, "died")
    registry.worker_leaves(run.store, 1)
    assert fleet._watch is not None
    fleet._watch.close()
    told.clear()
    fleet._out = set()
    for _ in range(2):
        fleet._seen(fleet._watch.members.look())
    assert told == [(run.servers[0].url, "died"), (run.servers[1].url, "")]
    fleet.client.close()


@pytest.mark.parametrize("transport", ["reshard", "broadcast"])
def test_the_first_sync_says_what_later_workers_are_held_to(
    run: Run, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Whole tensors are held as received by servers of one rank alone, and later ones may have more."""
    told: list[Any] = []

    class Leader:
        def __init__(self, *_: Any) -> None: ...
        def close(self) -> None: ...
        def init(self, name: str, inputs: Any, join: Any, remember_disk: bool, agreeing: Any) -> None:
            told.append(agreeing)

        def commit(self, version: int, ask_agreeing: bool) -> list[str]:
            return ["layer 0, experts"] if ask_agreeing else []

    monkeypatch.setattr(module, "SyncLeader", Leader)
    run.join()
    fleet = run.fleet(1)
    fleet._one_tp = transport == "reshard"
    for version in (1, 2, 3):
        fleet.connect(SyncSettings(transport, 1, True, 1.0), {}, False)
        fleet.commit(version)
    assert told == [None, *([["layer 0, experts"]] * 2 if transport == "reshard" else [None, None])]
    fleet.close()
