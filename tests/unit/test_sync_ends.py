"""A weight sync in which one rank fails, stands still or is given up: every rank's wait ends, and says whom it was for.

Our code from senders to receivers, a thread for each rank, over each transport: gloo and shared memory as they are,
NCCL as a stand-in whose messages pass as NCCL's do (test_sync_order.py).
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from threading import Event, Lock, Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.reshard.manifest import manifest_from
from megarl.weights.reshard.outgoing import Slices
from megarl.weights.reshard.pack import message_bytes
from megarl.weights.reshard.rollout_layout import RolloutLayout
from megarl.weights.transport import nccl
from megarl.weights.transport.groups import WeightGroup
from megarl.weights.transport.receive import receive
from megarl.weights.transport.send import Outgoing, WeightSender
from megarl.weights.transport.shared import SharedGroup

TRAIN, ROLLOUT = Layout(tp=2, world=2), RolloutLayout(2, 1)
WORLD = TRAIN.world + ROLLOUT.world
SENDER, RECEIVER = 1, 2  # ranks by which a sync fails
TOLD = r"rank (\d) of the weight group left it while this one waited for rank ([\d, ]+)"
LATE = r"weight group: (?:NCCL was not done|nothing came)(?: within 2 s with| from) rank ([\d, ]+)"


@dataclass
class Operations:
    """A group of them: what is not done yet, by the rank at the other end."""

    sends: list[tuple[int, Tensor]] = field(default_factory=list)
    receives: list[tuple[int, Tensor]] = field(default_factory=list)
    aborted: bool = False

    def is_completed(self) -> bool:
        return self.aborted or not (self.sends or self.receives)

    def wait(self, timeout: timedelta) -> None: ...


class Wires:
    """Between the ranks: one stream each, on which groups of operations follow one another."""

    def __init__(self) -> None:
        self.lock, self.streams = Lock(), defaultdict[int, deque[Operations]](deque)

    def hand_over(self, rank: int, operations: Operations) -> Operations:
        with self.lock:
            self.streams[rank].append(operations)
            while any(self._pass(source) for source in range(WORLD)):
                pass
        return operations

    def _pass(self, source: int) -> bool:
        """One message of the group that runs at `source`, or the group, which is done."""
        stream = self.streams[source]
        if stream and stream[0].is_completed():
            stream.popleft()
            return True
        for send in stream[0].sends if stream else ():
            other = self.streams[send[0]]
            for taking in other[0].receives if other else ():
                if taking[0] == source:
                    taking[1].copy_(send[1])
                    stream[0].sends.remove(send)
                    other[0].receives.remove(taking)
                    return True
        return False


class Backend:
    """torch's, of one rank (test_nccl_group.py compares the signatures)."""

    def __init__(self, wires: Wires, rank: int) -> None:
        self.wires, self.rank, self.all = wires, rank, list[Operations]()

    def eager_connect_single_device(self, device: torch.device) -> None: ...

    def _start_coalescing(self) -> None:
        self.all.append(Operations())

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> None:
        self.all[-1].sends.append((rank, tensors[0]))

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> None:
        self.all[-1].receives.append((rank, tensors[0]))

    def _end_coalescing(self) -> Operations:
        return self.wires.hand_over(self.rank, self.all[-1])

    def abort(self) -> None:
        for operations in self.all:
            operations.aborted = True


class StandsStill(Exception):
    """And closes nothing."""


@dataclass
class Sync:
    """Each rank does its part, `failing` until it has done two buckets. closes: whether that one leaves then."""

    medium: str
    failing: int
    closes: bool
    timeout_s: float
    hf: dict[str, Any]
    kept: dict[int, Slices] = field(default_factory=dict)  # a process that stands still keeps its buffers
    groups: dict[int, Any] = field(default_factory=dict)
    said: dict[int, str] = field(default_factory=dict)
    failed: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def part(self, rank: int) -> None:
        mine = dist.TCPStore("127.0.0.1", self.store.port, is_master=False)
        try:
            if rank < TRAIN.world:
                self._send(rank, mine)
            else:
                self._receive(rank, mine)
        except StandsStill:
            if self.closes:
                self.groups[rank].close()
            self.failed.set()
        except RuntimeError as error:
            self.said[rank] = str(error)
            self.groups[rank].close()  # as Fleet and WeightReceiver do

    def _group(self, rank: int, store: dist.Store) -> tuple[Any, ...]:
        return store, "sync", rank, WORLD, self.timeout_s, torch.device("cuda" if self.medium == "nccl" else "cpu", 0)

    def _send(self, rank: int, store: dist.Store) -> None:
        weight_map = WeightMap(self.hf)
        params = [(p, torch.zeros(p.shape)) for p in weight_map.params(TRAIN, TRAIN.coord(rank))]
        self.kept[rank] = Slices(weight_map, TRAIN, ROLLOUT, torch.bfloat16, rank)
        buckets = self.kept[rank].buckets(params)
        self.groups[rank] = WeightSender(*self._group(rank, store), shared=self.medium == "shared")
        self.groups[rank].send(self._until_it_fails(buckets) if rank == self.failing else buckets)

    def _until_it_fails(self, buckets: Iterator[Outgoing]) -> Iterator[Outgoing]:
        yield from islice(buckets, 2)
        raise StandsStill

    def _receive(self, rank: int, store: dist.Store) -> None:
        weight_map = WeightMap(self.hf)
        inputs = Slices(weight_map, TRAIN, ROLLOUT, torch.bfloat16, 0).manifest_inputs
        manifest = manifest_from(inputs, rank - TRAIN.world)
        group = (SharedGroup if self.medium == "shared" else WeightGroup)(*self._group(rank, store))
        self.groups[rank] = group

        def buffers(number: int) -> list[Tensor]:
            sizes = [message_bytes(message.slices, manifest.dtypes) for message in manifest.buckets[number]]
            return [torch.empty(size, dtype=torch.uint8) for size in sizes]

        taken = receive(group, [[message.source for message in bucket] for bucket in manifest.buckets], buffers)
        for number, _ in enumerate(taken, 1):
            if rank == self.failing and number == 2:
                raise StandsStill


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> None:
    between = Wires()
    monkeypatch.setattr(nccl, "_make", lambda store, rank, *_: Backend(between, rank))
    monkeypatch.setattr(nccl, "nccl_version", lambda: "2.28.3")
    monkeypatch.setattr(nccl, "LOOKS", 20)
    for bound in ("LEAST_BUCKET", "MOST_BUCKET"):
        monkeypatch.setattr(f"megarl.weights.reshard.plan.{bound}", 20_000)


def ended(sync: Sync, gives_up: bool = False) -> dict[int, str]:
    """What each other rank's part ended with; no text of one that was through before."""
    ranks = [Thread(target=sync.part, args=(rank,), daemon=True) for rank in range(WORLD)]
    for rank in ranks:
        rank.start()
    assert sync.failed.wait(60)
    if gives_up:
        sync.groups[0].close()  # rank 0 leads: SyncLeader's time is up
    for rank in ranks:
        rank.join(60)
    assert not any(rank.is_alive() for rank in ranks), "a rank waits for ever"
    return sync.said


@pytest.mark.usefixtures("wires")
@pytest.mark.parametrize("medium", ["nccl", "shared", "gloo"])
@pytest.mark.parametrize("failing", [SENDER, RECEIVER])
class TestEnds:
    def test_a_rank_that_fails_ends_the_sync_of_all(self, medium: str, failing: int, hf_config: dict[str, Any]) -> None:
        said = ended(Sync(medium, failing, closes=True, timeout_s=600, hf=hf_config))
        assert said and failing not in said
        if medium != "gloo":  # which says in its own words that a peer is gone
            accounts = [re.fullmatch(TOLD, line) for line in said.values()]
            assert all(account and account[1] == str(failing) for account in accounts), said

    def test_one_that_stands_still_is_waited_for_as_long_as_was_given(
        self, medium: str, failing: int, hf_config: dict[str, Any]
    ) -> None:
        said = ended(Sync(medium, failing, closes=False, timeout_s=2, hf=hf_config))
        assert said and failing not in said
        if medium != "gloo":
            waited_for = [re.match(f"{TOLD}|{LATE}", line) for line in said.values()]
            assert all(waited_for), said
            assert any(str(failing) in f"{each[2] or each[3]}" for each in waited_for if each), said

    def test_what_rank_0_gives_up_ends_for_all(self, medium: str, failing: int, hf_config: dict[str, Any]) -> None:
        # gloo tells those alone who have messages with rank 0: the others wait as long as was given
        limit = 2 if medium == "gloo" else 600
        said = ended(Sync(medium, failing, closes=False, timeout_s=limit, hf=hf_config), gives_up=True)
        assert said and failing not in said
        if medium != "gloo":
            others = [re.fullmatch(TOLD, line) for rank, line in said.items() if rank != 0]
            assert others and all(account and account[1] == "0" for account in others), said


@pytest.mark.usefixtures("wires")
@pytest.mark.parametrize("medium", ["nccl", "shared", "gloo"])
def test_a_sync_in_which_nobody_fails_is_whole(medium: str, hf_config: dict[str, Any]) -> None:
    sync = Sync(medium, failing=WORLD, closes=False, timeout_s=60, hf=hf_config)
    sync.failed.set()
    assert ended(sync) == {}
