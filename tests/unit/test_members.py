"""Who serves a run, told by a real store on this machine."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from megarl.rollout import members, patience, registry
from megarl.rollout.members import Members, Seen, Watch
from megarl.rollout.registry import WorkerInfo, open_store


def worker(index: int, port: int | None = None) -> WorkerInfo:
    return WorkerInfo(index, f"http://127.0.0.1:{port or 8000 + index}", 1, 100 + index, "here", f"/log{index}")


@pytest.fixture
def store() -> dist.TCPStore:
    return open_store("127.0.0.1", 0, is_master=True, timeout_s=5)


def joined(store: dist.TCPStore, port: int | None = None) -> int:
    index = registry.claim_index(store)
    registry.register_worker(store, worker(index, port))
    return index


def here(seen: Seen) -> list[int]:
    return [one.index for one in seen.here]


def test_workers_come_and_go(store: dist.TCPStore) -> None:
    looks = Members(store)
    assert looks.look() == Seen([], frozenset(), {})
    starting = registry.claim_index(store)
    first, second, third = (joined(store) for _ in range(3))
    assert here(looks.look()) == [first, second, third]
    assert looks.look().here[0] == worker(first)

    registry.report_failure(store, second, f"rollout worker {second}: ended; last lines of /log:\nTraceback")
    assert looks.look().gone == {second: f"rollout worker {second}: ended; its log is /log"}
    registry.report_failure(store, starting, "rollout worker 0: never answered")
    assert looks.look().gone.keys() == {starting, second} and here(looks.look()) == [first, third]

    registry.worker_leaves(store, third)
    assert (here(looks.look()), looks.look().leaving) == ([first], {third})
    registry.worker_left(store, third)
    assert looks.look().gone[third] == "" and looks.look().leaving == frozenset()
    late = joined(store)
    assert here(looks.look()) == [first, late]


def test_a_silent_worker_is_gone_until_it_beats_again(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "STALE_S", 10.0)
    clock = [0.0]
    monkeypatch.setattr(members.time, "monotonic", lambda: clock[0])
    looks, quiet, lively = Members(store), joined(store), joined(store)
    for clock[0] in (0.0, 9.0, 18.0):
        registry.heartbeat(store, lively)
        seen = looks.look()
    assert here(seen) == [lively]
    assert seen.gone == {
        quiet: "rollout worker 0 (http://127.0.0.1:8000, pid 100 on here) has been silent for 18 s; its log is /log0"
    }
    registry.heartbeat(store, quiet)
    assert here(looks.look()) == [quiet, lively]


def test_a_server_that_registers_again_counts_once(store: dist.TCPStore) -> None:
    """It had lost the store; its old number still looks alive for STALE_S."""
    looks = Members(store)
    joined(store, port=9000)
    again = joined(store, port=9000)
    assert here(looks.look()) == [again] and looks.look().gone == {0: ""}


def test_a_stranger_takes_no_worker_out(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_TOKEN", "of this run")
    index = joined(store)
    looks = Members(store)
    assert here(looks.look()) == [index]
    store.add("rollout/count", 10**9)
    for what in ("failed", "gone", "leaving", "beat", "claimed"):
        store.set(f"rollout/{index}/{what}", "x 1")
        store.set("rollout/news", f"x {what}")
        assert here(looks.look()) == [index]
    registry.heartbeat(store, index)
    assert joined(store) == 1 and here(looks.look()) == [0, 1]
    for key in ("rollout/news", f"rollout/{index}/beat"):
        store.delete_key(key)
        assert here(looks.look()) == [0, 1]
    assert [bool(beat) for beat in registry.beats(store, [0, 1])] == [False, True]


def test_a_look_costs_few_calls_while_nothing_is_new(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Members(store)
    for _ in range(5):
        joined(store)
    looks.look()
    monkeypatch.setattr(registry, "read", lambda *given: pytest.fail(f"asked for {given}"))
    assert len(here(looks.look())) == 5


def test_the_watch_goes_on_where_who_is_told_fails(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(members, "BEAT_S", 0.01)
    told = threading.Semaphore(0)

    def fails(seen: Seen) -> None:
        told.release()
        raise TimeoutError

    watch = Watch(open_store("127.0.0.1", store.port, is_master=False, timeout_s=5), fails)
    assert told.acquire(timeout=30) and told.acquire(timeout=30)
    watch.close()
    assert "megarl: the watch of the rollout workers: TimeoutError" in capfd.readouterr().err


def test_the_watch_tells(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "BEAT_S", 0.01)
    told: list[Seen] = []
    watch = Watch(open_store("127.0.0.1", store.port, is_master=False, timeout_s=5), told.append)
    index = joined(store)
    until = time.monotonic() + 30
    while not (told and here(told[-1]) == [index]) and time.monotonic() < until:
        time.sleep(0.01)
    assert here(told[-1]) == [index]
    watch.close()
