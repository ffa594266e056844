"""What rank 0 says of a server that takes too long over a step of a sync."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from megarl.rollout.client import Server
from megarl.rollout.registry import ServerSilent, WorkerInfo
from megarl.rollout.sync_leader import InFlight, SyncLeader, SyncSettings


def test_the_limit_that_is_told_is_the_one_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def trickles(self: Server, *asked: Any) -> bytes:
        """As of a server whose answer comes byte by byte: no time limit of the connection ends it."""
        over.wait(30)
        return b"{}"

    monkeypatch.setattr(Server, "post", trickles)
    worker = WorkerInfo(0, "http://127.0.0.1:1", 1, 7, "here", "/log")
    leader = SyncLeader([worker], "127.0.0.1", 1, SyncSettings("reshard", 1, True, timeout_s=60))
    try:
        with pytest.raises(ServerSilent, match="no answer within 1 s from rollout server http://127.0.0.1:1$"):
            leader.push(lambda: None, [], lambda: None, InFlight("finish", 1, drain_s=1))
    finally:
        over.set()
