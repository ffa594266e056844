"""Trainer ranks of several hosts, as threads that meet in one store: who is told what, and when a rank is ended."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megarl.door import signed
from megarl.errors import UserError
from megarl.launch import peers
from megarl.launch.peers import Peers
from megarl.launch.starts import keep_up

HERE = "127.0.0.1"


class Rank:
    def __init__(self, rank: int, world: int) -> None:
        self.told: list[str] = []
        self.ended = threading.Event()
        self.peers = Peers(rank, world, self.told.append, self.ended.set)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[Rank]]]:
    """That many ranks, joined."""
    monkeypatch.setattr(peers, "WORDS_S", 0.3)
    made: list[Rank] = []

    def start(world: int) -> list[Rank]:
        store = dist.HashStore()
        made.extend(Rank(rank, world) for rank in range(world))
        with ThreadPoolExecutor(world) as pool:
            list(pool.map(lambda rank: rank.peers.join(store, HERE), made))
            list(pool.map(lambda rank: rank.peers.meet("the start"), made))
        return made

    yield start
    for rank in made:
        rank.peers.close()


def test_the_first_to_fail_tells_all_and_they_end(ranks: Callable[[int], list[Rank]]) -> None:
    zero, one, two = ranks(3)
    assert two.peers.tell("megarl: error: mend it") == "megarl: error: mend it"
    assert zero.ended.wait(10) and one.ended.wait(10)
    assert zero.told == one.told == ["megarl: error: mend it"] and two.told == []
    assert one.peers.tell("a consequence") == "megarl: error: mend it" == one.peers.hear(0)


def test_a_rank_that_is_killed_is_named_and_one_that_leaves_in_order_is_not(ranks: Callable[[int], list[Rank]]) -> None:
    zero, one, two = ranks(3)
    two.peers.close()
    time.sleep(1)
    assert not zero.ended.is_set() and not one.ended.is_set()
    one.peers._links[0].connection.shutdown(socket.SHUT_RDWR)  # as the kernel does for a killed process
    line = f"megarl: error: trainer rank 1 on host {socket.gethostname()} ended without a word"
    assert zero.peers.hear(10) == line  # as a rank does that has lost its peer
    assert zero.ended.wait(10) and zero.told == [line]


def test_process_groups_that_do_not_connect_are_bounded(
    ranks: Callable[[int], list[Rank]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "CONNECTED_S", 0.2)
    monkeypatch.setattr(peers, "A_RANK_S", 0.0)
    zero, one = ranks(2)

    def connects(rank: Rank) -> None:
        with rank.peers.connecting():
            assert rank.ended.wait(10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(connects, [zero, one]))
    assert "did not connect to each other within 0.2 s, on the networks of" in zero.told[0] and HERE in zero.told[0]


def test_who_does_not_come_to_a_meeting_is_named(
    ranks: Callable[[int], list[Rank]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rank 0, which alone knows it: those that came are not blamed."""
    monkeypatch.setattr(peers, "WORDS_S", 30.0)
    zero, one, _ = ranks(3)
    with ThreadPoolExecutor(2) as pool:
        came = pool.submit(one.peers.meet, "a step", 0.5)
        with pytest.raises(
            UserError, match=rf"came to a step within 0.5 s; missing: rank 2 \(host {socket.gethostname()}\);"
        ) as late:
            pool.submit(zero.peers.meet, "a step", 0.5).result()
        zero.peers.tell(f"megarl: error: {late.value}")
        with pytest.raises(UserError, match="another rank ended the run"):
            came.result()
    assert one.told == [f"megarl: error: {late.value}"]


def test_rank_0_where_it_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "REACH_S", 0.0)
    store = dist.HashStore()
    store.set("0/address", signed("peers", json.dumps([HERE, 9, "node0"])))
    with pytest.raises(UserError, match="rank 1 on host .* cannot reach rank 0 at 127.0.0.1 on host node0 .*interface"):
        Rank(1, 2).peers.join(store, HERE)
    store.set("0/failed", signed("peers", "rank 1 cannot reach rank 0"))
    with pytest.raises(UserError, match="rank 1 cannot reach rank 0"):
        Rank(0, 2).peers.join(store, HERE)
    monkeypatch.setattr(peers, "JOIN_S", 0.0)
    with pytest.raises(UserError, match=r"ranks \[1, 2\] did not come within 0 s of rank 0 on host .*--node-rank 1, 2"):
        Rank(0, 3).peers.join(dist.HashStore(), HERE)
    with pytest.raises(UserError, match=r"rank 0 did not come within 0 s of rank 1 on host .*--node-rank 0 says why"):
        Rank(1, 3).peers.join(dist.HashStore(), HERE)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_a_start_of_which_another_node_is_beyond_ends(rank: int) -> None:
    """Its node starts it again, and the counts meet. Each node waited 300 s for what the other had left, in turns."""
    store = dist.HashStore()
    keep_up(store, 0)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(Rank(rank, 2).peers.join, store, HERE)
        keep_up(store, 2)
        with pytest.raises(UserError, match=r"another host were started again \(restart 2, here 0\)"):
            waits.result(30)
    with pytest.raises(UserError, match=r"\(restart 2, here 1\)"):
        Rank(rank, 2).peers.join(store, HERE, 1)


def test_rank_0_waits_for_nobody_once_one_that_came_has_ended() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(Rank(0, 3).peers.join, store, HERE)
        one = Rank(1, 3)
        one.peers.join(store, HERE)
        one.peers._links[0].connection.shutdown(socket.SHUT_RDWR)  # as the kernel does for a killed process
        with pytest.raises(UserError, match=f"^trainer rank 1 on host {socket.gethostname()} ended without a word"):
            waits.result(30)
    one.peers.close()


def test_a_store_of_torchrun_that_nobody_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "STORE_S", 0.5)
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**env, "MASTER_ADDR": HERE, "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^rank 1 on host \S+ does not reach torchrun's store at 127.0.0.1:9, of"):
        peers.joined(print, lambda: None, None, HERE)


def listening_rank_0(
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[dist.HashStore, Rank, threading.Thread, tuple[str, int]]:
    """Rank 0 of two, in a thread that waits for the other; and where it listens."""
    monkeypatch.setattr(peers, "JOIN_S", 5.0)
    store, zero = dist.HashStore(), Rank(0, 2)
    joining = threading.Thread(target=zero.peers.join, args=(store, HERE))
    joining.start()
    while not store.check(["0/address"]):
        time.sleep(0.01)
    host, port, _ = json.loads(store.get("0/address").decode().partition(" ")[2])
    return store, zero, joining, (host, port)


def test_a_stranger_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    store, zero, joining, address = listening_rank_0(monkeypatch)
    with socket.create_connection(address) as stranger:
        stranger.sendall(b'{"rank": 1, "host": "x", "address": "y"}\n')
        assert stranger.recv(1) == b""
    one = Rank(1, 2)
    one.peers.join(store, HERE)
    joining.join(10)
    assert zero.peers._links.keys() == {1} and zero.peers._links[1].host == socket.gethostname()
    one.peers.close()
    zero.peers.close()


def test_a_word_that_comes_at_once_with_the_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    store, zero, joining, address = listening_rank_0(monkeypatch)
    said = [{"rank": 1, "host": "node1", "address": HERE}, {"at": "the start"}]
    with socket.create_connection(address) as one:
        one.sendall("".join(signed("peers", json.dumps(message)) + "\n" for message in said).encode())
        joining.join(10)
        zero.peers.meet("the start", within_s=5.0)
        zero.peers.close()
