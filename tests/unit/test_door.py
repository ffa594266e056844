"""Who may ask a server what, and whose words in the store count."""

from __future__ import annotations

import dataclasses
import json
import socket

import pytest

from megarl import door
from megarl.rollout import registry
from megarl.rollout.registry import RolloutDied, WorkerInfo, check_workers, open_store, wait_for_workers

TOKENS = door.Tokens("data-token", "control-token")


@pytest.mark.parametrize(
    ("method", "path", "token", "opens"),
    [
        ("GET", "/health", "", True),
        ("POST", "/health", "", False),
        ("POST", "/megarl/generate", "", False),
        ("POST", "/megarl/generate", "other", False),
        ("POST", "/megarl/generate", "data-token", True),
        ("POST", "/megarl/sync/version", "data-token", True),
        ("POST", "/inference/v1/generate", "data-token", True),
        ("POST", "/inference/v1/abort_requests", "data-token", False),
        ("POST", "/inference/v1/abort_requests", "control-token", True),
        ("POST", "/v1/completions", "data-token", True),
        ("POST", "/megarl/sync/load", "data-token", False),
        ("POST", "/collective_rpc", "data-token", False),
        ("POST", "/pause", "data-token", False),
        ("GET", "/metrics", "", False),
        ("POST", "/megarl/sync/load", "control-token", True),
        ("POST", "/collective_rpc", "control-token", True),
        ("POST", "/megarl/generate", "control-token", True),
    ],
)
def test_each_token_opens_its_own_routes(method: str, path: str, token: str, opens: bool) -> None:
    found = door.refused(method, path, f"Bearer {token}" if token else "", TOKENS)
    assert (found is None) == opens and (found is None or "\n" not in found)


def test_a_server_without_tokens_is_closed() -> None:
    assert door.refused("POST", "/megarl/generate", "Bearer ", door.Tokens("", "")) is not None


def test_a_stranger_says_nothing_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(door.RUN_SECRET, "of the run")
    store = open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
    stranger = open_store("127.0.0.1", store.port, is_master=False, timeout_s=5)
    info = WorkerInfo(0, "http://127.0.0.1:8000", 1, 7, "here", "/log")
    assert registry.claim_index(store) == 0
    stranger.set("rollout/0/info", json.dumps(dataclasses.asdict(info)))
    stranger.get("rollout/0/info")
    with pytest.raises(Exception, match="0 of 1 rollout workers came"):
        wait_for_workers(store, 1, 0.1)
    registry.register_worker(store, info)
    [worker] = wait_for_workers(store, 1, 1)
    assert worker.tokens == door.server_tokens() and b"of the run" not in store.get("rollout/0/info")
    assert worker.tokens.control.encode() not in store.get("rollout/0/info")
    for key in ("rollout/shutdown", "rollout/0/failed"):
        stranger.set(key, "so says a stranger")
        stranger.get(key)
    assert not registry.shutdown_requested(store)
    check_workers(store, [worker])
    registry.report_failure(store, 0, "line one\nline two")
    store.get("rollout/0/failed")
    with pytest.raises(RolloutDied, match="^line one\nline two$"):
        check_workers(store, [worker])


def test_a_run_without_a_secret_hands_its_tokens_through_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(door.RUN_SECRET, raising=False)
    store = open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
    info = WorkerInfo(registry.claim_index(store), "http://127.0.0.1:8000", 1, 7, "here", "/log", TOKENS)
    registry.register_worker(store, info)
    assert wait_for_workers(store, 1, 1)[0].tokens == TOKENS and "control-token" not in repr(info)


def test_the_store_listens_at_its_own_address_alone() -> None:
    store = open_store("127.0.0.1", 0, is_master=True, timeout_s=5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=2)
