"""What NCCL is asked to do in a weight sync, as a state machine: no order in which two ranks wait for each other.

Each rank runs our own code over a group that notes what it is handed. Then all of them run together as NCCL would run
them: one stream a rank, on which groups of operations follow one another; a message passes once both ends' groups run;
a host that waits hands over nothing more.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.reshard.manifest import slice_manifest, slice_plan
from megarl.weights.reshard.outgoing import Slices
from megarl.weights.reshard.pack import message_bytes
from megarl.weights.reshard.rollout_layout import RolloutLayout
from megarl.weights.transport import send
from megarl.weights.transport.receive import receive

LAYOUTS = [
    (Layout(), RolloutLayout()),
    (Layout(tp=2, pp=2, vpp=2, ep=4, world=16), RolloutLayout(2, 2)),
    (Layout(tp=2, ep=2, etp=2, world=8), RolloutLayout(1, 4)),
    (Layout(tp=2, cp=2, ep=4, world=8), RolloutLayout(3, 1)),
    (Layout(pp=4, ep=2, world=16), RolloutLayout(2, 1, ep=8)),
]
Message = tuple[int, int, int]  # source, destination, bytes


@dataclass
class Step:
    """Of a host: it hands over a group of messages, or waits until an earlier one is done (wait: its number)."""

    messages: list[Message] = field(default_factory=list)
    wait: int | None = None


class Noted:
    """A group that passes nothing on. in_flight: memory that NCCL's stream may still read or fill."""

    def __init__(self, rank: int) -> None:
        self.rank, self.steps, self.groups = rank, list[Step](), 0
        self.in_flight: dict[int, set[int]] = {}

    def exchange(self, sends: Any, receives: Any, tag: int) -> list[Pending]:
        memory = {buffer.data_ptr() for buffer, _ in [*sends, *receives]}
        assert not any(memory & used for used in self.in_flight.values()), (
            "memory is used again before its message left"
        )
        messages = [(self.rank, other, buffer.numel()) for buffer, other in sends]
        messages += [(other, self.rank, buffer.numel()) for buffer, other in receives]
        number, self.groups = self.groups, self.groups + 1
        self.in_flight[number] = memory
        self.steps.append(Step(messages))
        return [Pending(self, number)]


@dataclass
class Pending:
    group: Noted
    number: int

    def wait(self) -> None:
        self.group.steps.append(Step(wait=self.number))
        del self.group.in_flight[self.number]


def noted(train: Layout, rollout: RolloutLayout, hf: dict[str, Any], monkeypatch: Any) -> list[list[Step]]:
    """What the host of each rank does, senders first."""
    weight_map, dtype = WeightMap(hf), torch.bfloat16
    monkeypatch.setattr(send, "WeightGroup", lambda store, name, rank, *rest: Noted(rank))
    for bound in ("LEAST_BUCKET", "MOST_BUCKET"):
        monkeypatch.setattr(f"megarl.weights.reshard.plan.{bound}", 20_000)
    hosts = []
    for rank in range(train.world):
        sender = send.WeightSender(None, "", rank, 0, 1.0, torch.device("cpu"))  # type: ignore[arg-type]
        params = [(p, torch.zeros(p.shape)) for p in weight_map.params(train, train.coord(rank))]
        sender.send(Slices(weight_map, train, rollout, dtype, rank).buckets(params))
        hosts.append(sender._group.steps)  # type: ignore[union-attr]
    plan = slice_plan(weight_map, train, rollout, dtype)
    assert plan.buckets > 3
    for rank in range(rollout.world):
        manifest = slice_manifest(plan, weight_map, dtype, rank)
        group, buckets = Noted(train.world + rank), manifest.buckets

        def buffers(number: int, buckets: Any = buckets, dtypes: Any = manifest.dtypes) -> list[torch.Tensor]:
            return [torch.empty(message_bytes(m.slices, dtypes), dtype=torch.uint8) for m in buckets[number]]

        for _ in receive(group, [[m.source for m in bucket] for bucket in buckets], buffers):  # type: ignore[arg-type]
            pass
        hosts.append(group.steps)
    return hosts


def run(hosts: list[list[Step]]) -> None:
    """AssertionError with who waits for whom where no rank can go on, or where the ends of a message differ."""
    at = [0] * len(hosts)  # the next step of each host
    handed = [deque[list[Message]]() for _ in hosts]  # to each stream: the first group runs
    done, begun = [0] * len(hosts), [False] * len(hosts)
    ends: dict[tuple[int, int], dict[int, deque[int]]] = defaultdict(lambda: {0: deque(), 1: deque()})

    def advance(rank: int) -> bool:
        step = hosts[rank][at[rank]] if at[rank] < len(hosts[rank]) else None
        if step is not None and (step.wait is None or done[rank] > step.wait):
            if step.wait is None:
                handed[rank].append(list(step.messages))
            at[rank] += 1
            return True
        return False

    moved = True
    while moved:
        moved = sum(advance(rank) for rank in range(len(hosts))) > 0  # every one, not until the first
        for rank, stream in enumerate(handed):
            if stream and not begun[rank]:
                begun[rank] = moved = True
                for source, destination, size in stream[0]:
                    ends[source, destination][int(rank == destination)].append(size)
        for (source, destination), (sent, received) in ((k, (v[0], v[1])) for k, v in ends.items()):
            while sent and received:  # both ends run
                sizes, moved = (sent.popleft(), received.popleft()), True
                assert sizes[0] == sizes[1], f"{source} sends {sizes[0]} bytes to {destination}, which takes {sizes[1]}"
                for rank in (source, destination):
                    group = handed[rank][0]
                    group.remove(next(m for m in group if m[:2] == (source, destination)))
        for rank, stream in enumerate(handed):
            if begun[rank] and not stream[0]:
                stream.popleft()
                begun[rank], done[rank], moved = False, done[rank] + 1, True
    stuck = {rank: stream[0] for rank, stream in enumerate(handed) if stream}
    assert not stuck, f"ranks wait for each other: {stuck}"
    assert all(place == len(steps) for place, steps in zip(at, hosts, strict=True))


@pytest.mark.parametrize(("train", "rollout"), LAYOUTS, ids=str)
def test_no_two_ranks_wait_for_each_other(
    hf_config: dict[str, Any], train: Layout, rollout: RolloutLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(noted(train, rollout, hf_config, monkeypatch))


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
    with pytest.raises(AssertionError, match="wait for each other"):
        run(hosts)


def test_buckets_in_another_order_are_found(hf_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    train, rollout = LAYOUTS[1]
    hosts = noted(train, rollout, hf_config, monkeypatch)
    groups = [step for step in hosts[-1] if step.wait is None]
    hosts[-1] = [*reversed(groups), *(Step(wait=number) for number in range(len(groups)))]
    with pytest.raises(AssertionError, match=r"wait for each other|which takes"):
        run(hosts)
