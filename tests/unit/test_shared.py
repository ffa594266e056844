"""The weight group over shared memory (megarl.weights.transport.shared):
several ranks as threads of this process, each with a store of its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from megarl.weights.transport.send import Outgoing, WeightSender
from megarl.weights.transport.shared import SharedGroup

CPU = torch.device("cpu")


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(store, ranks, timeout_s=20.0):
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: SharedGroup(store, "test", rank, ranks, timeout_s, CPU), range(ranks)))


def numbered(number, size=1000):
    return torch.full((size,), number, dtype=torch.uint8)


def test_buckets_of_a_sender_reach_every_rank_in_order(store):
    """Through WeightSender, from a ring of two buffers for each rank that is used again, as Slices does."""
    buckets = 7
    with ThreadPoolExecutor(3) as pool:
        sender = pool.submit(WeightSender, store, "sync", 0, 3, 20.0, CPU, True)
        groups = [pool.submit(SharedGroup, store, "sync", rank, 3, 20.0, CPU) for rank in (1, 2)]
        rings = [[torch.empty(1000, dtype=torch.uint8) for _ in range(2)] for _ in range(2)]

        def send():
            for bucket in range(buckets):
                for rank, ring in enumerate(rings):
                    ring[bucket % 2].fill_(10 * rank + bucket)
                yield Outgoing(
                    [(ring[bucket % 2][: 900 + bucket], rank + 1) for rank, ring in enumerate(rings)], bucket
                )

        sent = pool.submit(sender.result().send, send())
        for bucket in range(buckets):
            for rank, group in enumerate(groups):
                got = torch.zeros(900 + bucket, dtype=torch.uint8)
                for work in group.result().exchange([], [(got, 0)], bucket):
                    work.wait()
                assert got.eq(10 * rank + bucket).all(), (rank, bucket)
        sent.result(20)
        assert len(groups[0].result()._open["0"]) == 2, "two storages, opened once each"


def test_a_broadcast_reaches_all(store):
    groups, buffers = meet(store, 3), [numbered(9), numbered(0), numbered(0)]
    works = [group.broadcast(buffer) for group, buffer in zip(groups, buffers)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda work: work.wait(), works))
    assert all(buffer.eq(9).all() for buffer in buffers)


def test_of_buffers_that_are_not_used_again_no_more_than_two_stay_open(store):
    """As those of a broadcast: a storage that the reader holds open stays allocated at the sender."""
    sender, receiver = meet(store, 2)
    opened = []
    for number in range(5):
        (work,) = sender.exchange([(numbered(number), 1)], [], number)
        got = numbered(99)
        receiver.exchange([], [(got, 0)], number)[0].wait()
        work.wait()
        assert got.eq(number).all()
        opened.append(list(receiver._open["0"]))
    assert [len(each) for each in opened] == [1, 2, 2, 2, 2] and len(set(sum(opened, []))) == 5


@pytest.mark.parametrize("waiting", ["sender", "receiver"])
def test_a_rank_that_leaves_ends_the_others_wait(store, waiting):
    groups = meet(store, 2, timeout_s=60.0)
    work = (
        groups[0].exchange([(numbered(1), 1)], [], 0)
        if waiting == "sender"
        else groups[1].exchange([], [(numbered(0), 0)], 0)
    )
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(work[0].wait)
        groups[1 if waiting == "sender" else 0].close()
        with pytest.raises(RuntimeError, match="rank . of the weight group left it"):
            waited.result()


def test_nobody_comes(store):
    with pytest.raises(RuntimeError, match=r"nothing came from rank 1 within 0\.3 s \(here/1\)"):
        SharedGroup(store, "alone", 0, 2, 0.3, CPU)


def test_a_closed_group_waits_for_nothing(store):
    first, _ = meet(store, 2)
    (work,) = first.exchange([], [(numbered(0), 1)], 0)
    first.close()
    first.close()
    with pytest.raises(RuntimeError, match="was closed"):
        work.wait()
    with pytest.raises(RuntimeError, match="was closed"):  # a wait of it that has looked between the two
        first._refuse_if_left(1)


def test_a_buffer_that_its_sender_has_let_go_of_is_told_as_the_sender_that_left(store):
    """A sync that was given up frees them."""
    sender, receiver = meet(store, 2)
    sender.exchange([(numbered(1), 1)], [], 0)
    (work,) = receiver.exchange([], [(numbered(0), 0)], 0)
    sender.close()
    with pytest.raises(RuntimeError, match="rank 0 of the weight group left it while this one waited for rank 0"):
        work.wait()
