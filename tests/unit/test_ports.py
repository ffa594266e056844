"""Ports that nothing else on the machine takes before a server binds them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megarl.launch import ports


def test_a_port_is_free_and_no_outgoing_connection_can_have_it() -> None:
    first = int(ports.EPHEMERAL.read_text().split()[0])
    found = {ports.free_port("127.0.0.1") for _ in range(20)}
    assert len(found) > 15 and all(first - ports.SPAN <= port < first for port in found)
    for port in found:
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports.free_port("127.0.0.1")))
        taken = other.getsockname()[1]
        drawn = iter([taken, taken, taken - 1, taken - 2])
        monkeypatch.setattr(ports.random.SystemRandom, "randrange", lambda self, *range_: next(drawn))
        assert ports.free_port("127.0.0.1") in (taken - 1, taken - 2)


@pytest.mark.parametrize("text", ["1024\t65535\n", None])
def test_a_kernel_that_leaves_no_room(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "range"
    if text:
        path.write_text(text)
    monkeypatch.setattr(ports, "EPHEMERAL", path)
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports.free_port("127.0.0.1")))
