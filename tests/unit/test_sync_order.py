"""What a transport is asked for in a weight sync, as a state machine: no order in which two ranks wait for each other.

Each rank runs our own code over groups that note what they are handed. Then all of them run together. NCCL: one stream
a rank and communicator, on which groups of operations follow one another; a message passes once both ends' groups run;
a host that waits hands over nothing more. Shared memory (launch.colocate): a message lies there once it is handed over,
and is taken when its receiver waits for it. What becomes of a sync that fails: test_sync_ends.py.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.reshard import gather, outgoing
from megarl.weights.reshard.manifest import manifest_from
from megarl.weights.reshard.pack import message_bytes
from megarl.weights.reshard.rollout_layout import RolloutLayout
from megarl.weights.transport import send
from megarl.weights.transport.groups import SENDER
from megarl.weights.transport.receive import receive

LAYOUTS = [
    (Layout(), RolloutLayout()),
    (Layout(tp=2, pp=2, vpp=2, ep=4, world=16), RolloutLayout(2, 2)),
    (Layout(tp=2, ep=2, etp=2, world=8), RolloutLayout(1, 4)),
    (Layout(tp=2, cp=2, ep=4, world=8), RolloutLayout(3, 1)),
    (Layout(pp=4, ep=2, world=16), RolloutLayout(2, 1, ep=8)),
]
TRANSPORTS = ("reshard", "broadcast")
WEIGHTS, TRAINERS = 0, 1  # communicators: the weight group, the trainers' own
Message = tuple[int, int, int]  # source, destination, bytes


@dataclass
class Step:
    """Of a host: it hands over a group of messages, or waits until an earlier one is done (wait: its number)."""

    messages: list[Message] = field(default_factory=list)
    wait: int | None = None
    group: int = WEIGHTS


class Noted:
    """A group that passes nothing on. hosts: of its ranks. in_flight: memory that may still be read or filled."""

    def __init__(self, rank: int, hosts: Sequence[int]) -> None:
        self.rank, self.hosts, self.steps = rank, hosts, list[Step]()
        self.handed = {WEIGHTS: 0, TRAINERS: 0}
        self.in_flight: dict[int, set[int]] = {}

    def exchange(self, sends: Any, receives: Any, tag: int) -> list[Pending]:
        memory = {buffer.data_ptr() for buffer, _ in [*sends, *receives]}
        assert not any(memory & used for used in self.in_flight.values()), (
            "memory is used again before its message left"
        )
        me = self.hosts[self.rank]
        messages = [(me, self.hosts[other], buffer.numel()) for buffer, other in sends]
        messages += [(self.hosts[other], me, buffer.numel()) for buffer, other in receives]
        number = self.hand_over(messages, WEIGHTS)
        self.in_flight[number] = memory
        return [Pending(self, number)]

    def broadcast(self, buffer: torch.Tensor) -> Pending:
        others = [(buffer, other) for other in range(1, len(self.hosts))]
        [pending] = self.exchange([], [(buffer, SENDER)], 0) if self.rank else self.exchange(others, [], 0)
        return pending

    def hand_over(self, messages: list[Message], group: int) -> int:
        self.steps.append(Step(messages, group=group))
        self.handed[group] += 1
        return self.handed[group] - 1

    def among_trainers(self, message: Message) -> None:
        """Of the gather before a broadcast: the host waits at once."""
        self.steps.append(Step(wait=self.hand_over([message], TRAINERS), group=TRAINERS))


@dataclass
class Pending:
    group: Noted
    number: int

    def wait(self) -> None:
        self.group.steps.append(Step(wait=self.number))
        del self.group.in_flight[self.number]


def noted(
    train: Layout, rollout: RolloutLayout, hf: dict[str, Any], monkeypatch: Any, transport: str = "reshard"
) -> list[list[Step]]:
    """What the host of each rank does, trainers first."""
    weight_map, dtype, steps = WeightMap(hf), torch.bfloat16, list[list[Step]]()
    for bound in ("LEAST_BUCKET", "MOST_BUCKET"):
        monkeypatch.setattr(f"megarl.weights.reshard.plan.{bound}", 20_000)
    monkeypatch.setattr(outgoing, "BUCKET_BYTES", 20_000)
    monkeypatch.setattr(outgoing, "gather_full", partial(gather.gather_full, bucket_bytes=20_000))
    workers, senders = range(train.world, train.world + rollout.world), train.world if transport == "reshard" else 1
    hosts = [*range(senders), *workers]
    for rank in range(train.world):
        group = Noted(rank, hosts)
        monkeypatch.setattr(send, "WeightGroup", lambda *_, group=group: group)
        among = group.among_trainers
        monkeypatch.setattr(
            gather.dist, "send", lambda x, dst, rank=rank, among=among: among((rank, dst, x.numel() * x.element_size()))
        )
        monkeypatch.setattr(
            gather.dist, "recv", lambda x, src, rank=rank, among=among: among((src, rank, x.numel() * x.element_size()))
        )
        params = [(p, torch.zeros(p.shape)) for p in weight_map.params(train, train.coord(rank))]
        if transport == "reshard":
            source: Any = outgoing.Slices(weight_map, train, rollout, dtype, rank)
        else:
            source = outgoing.WholeTensors(weight_map, train, dtype, rank)
        if rank < senders:
            send.WeightSender(None, "", rank, 0, 1.0, torch.device("cpu")).send(source.buckets(params))  # type: ignore[arg-type]
        else:
            deque(source.buckets(params), maxlen=0)  # as Fleet.push does without a sender
        steps.append(group.steps)
        inputs = source.manifest_inputs
    for rank in range(rollout.world):
        manifest = manifest_from(inputs, rank)
        group, buckets = Noted(senders + rank, hosts), manifest.buckets
        assert len(buckets) > 3

        def buffers(number: int, buckets: Any = buckets, dtypes: Any = manifest.dtypes) -> list[torch.Tensor]:
            return [torch.empty(message_bytes(m.slices, dtypes), dtype=torch.uint8) for m in buckets[number]]

        named = [[m.source if transport == "reshard" else None for m in bucket] for bucket in buckets]
        for _ in receive(group, named, buffers):  # type: ignore[arg-type]
            pass
        steps.append(group.steps)
    return steps


@dataclass
class Stream:
    """Of a rank and a communicator: the first group runs."""

    handed: deque[list[Message]] = field(default_factory=deque)
    begun: bool = False
    done: int = 0


def run(hosts: list[list[Step]]) -> None:
    """Over NCCL. AssertionError with who waits for whom where no rank can go on, or where the ends of a message
    differ.
    """
    at = [0] * len(hosts)  # the next step of each host
    streams = {(rank, group): Stream() for rank in range(len(hosts)) for group in (WEIGHTS, TRAINERS)}
    ends: dict[tuple[int, int, int], dict[int, deque[int]]] = defaultdict(lambda: {0: deque(), 1: deque()})

    def advance(rank: int) -> bool:
        step = hosts[rank][at[rank]] if at[rank] < len(hosts[rank]) else None
        if step is not None and (step.wait is None or streams[rank, step.group].done > step.wait):
            if step.wait is None:
                streams[rank, step.group].handed.append(list(step.messages))
            at[rank] += 1
            return True
        return False

    moved = True
    while moved:
        moved = sum(advance(rank) for rank in range(len(hosts))) > 0  # every one, not until the first
        for (rank, group), stream in streams.items():
            if stream.handed and not stream.begun:
                stream.begun = moved = True
                for source, destination, size in stream.handed[0]:
                    ends[group, source, destination][int(rank == destination)].append(size)
        for (group, source, destination), (sent, received) in ((k, (v[0], v[1])) for k, v in ends.items()):
            while sent and received:  # both ends run
                sizes, moved = (sent.popleft(), received.popleft()), True
                assert sizes[0] == sizes[1], f"{source} sends {sizes[0]} bytes to {destination}, which takes {sizes[1]}"
                for rank in (source, destination):
                    messages = streams[rank, group].handed[0]
                    messages.remove(next(m for m in messages if m[:2] == (source, destination)))
        for stream in streams.values():
            if stream.begun and not stream.handed[0]:
                stream.handed.popleft()
                stream.begun, stream.done, moved = False, stream.done + 1, True
    stuck = {which: stream.handed[0] for which, stream in streams.items() if stream.handed}
    assert not stuck, f"ranks wait for each other: {stuck}"
    assert all(place == len(steps) for place, steps in zip(at, hosts, strict=True))


def run_shared(hosts: list[list[Step]]) -> None:
    """Over shared memory: of what a host waits for it takes one message after the other. As run()."""
    lying, taken = dict[tuple[int, ...], int](), set[tuple[int, ...]]()  # (source, destination, number)

    def life(rank: int, steps: list[Step]) -> Iterator[tuple[int, ...]]:
        """Yields the message that it waits for, again and again."""
        groups: list[list[tuple[tuple[int, ...], int]]] = []
        counts: dict[tuple[int, int], int] = defaultdict(int)
        for step in steps:
            if step.wait is None:
                groups.append([])
                for source, destination, size in step.messages:
                    key = source, destination, counts[source, destination]
                    counts[source, destination] += 1
                    groups[-1].append((key, size))
                    if rank == source:
                        lying[key] = size
                continue
            for key, size in groups[step.wait]:
                while key not in (taken if rank == key[0] else lying):
                    yield key
                if rank == key[1]:
                    assert lying[key] == size, f"{key[0]} sends {lying[key]} bytes to {key[1]}, which takes {size}"
                    taken.add(key)

    waiting = {rank: life(rank, steps) for rank, steps in enumerate(hosts)}
    while waiting:
        before = len(lying), len(taken), len(waiting)
        stuck = {rank: next(host, None) for rank, host in waiting.items()}
        waiting = {rank: host for rank, host in waiting.items() if stuck[rank] is not None}
        assert before != (len(lying), len(taken), len(waiting)), f"ranks wait for each other: {stuck}"
    assert taken == lying.keys()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("train", "rollout"), LAYOUTS, ids=str)
def test_no_two_ranks_wait_for_each_other(
    hf_config: dict[str, Any],
    train: Layout,
    rollout: RolloutLayout,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = noted(train, rollout, hf_config, monkeypatch, transport)
    run(hosts)
    run_shared([[step for step in steps if step.group == WEIGHTS] for steps in hosts])


def singly(steps: list[Step], *, backwards: bool) -> list[Step]:
    """The same messages, each a group of its own that the host waits for."""
    alone: list[Step] = []
    for step in steps:
        for message in reversed(step.messages) if backwards else step.messages:
            alone += [Step([message]), Step(wait=len(alone) // 2)]
    return alone


def test_an_order_that_hangs_is_found(hf_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages one by one, and one receiver that takes its sources the other way round."""
    train, rollout = LAYOUTS[1]
    hosts = [
        singly(steps, backwards=rank == train.world)
        for rank, steps in enumerate(noted(train, rollout, hf_config, monkeypatch))
    ]
    for machine in (run, run_shared):
        with pytest.raises(AssertionError, match="wait for each other"):
            machine(hosts)


def test_buckets_in_another_order_are_found(hf_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    train, rollout = LAYOUTS[1]
    hosts = noted(train, rollout, hf_config, monkeypatch)
    groups = [step for step in hosts[-1] if step.wait is None]
    hosts[-1] = [*reversed(groups), *(Step(wait=number) for number in range(len(groups)))]
    with pytest.raises(AssertionError, match=r"wait for each other|which takes"):
        run(hosts)
