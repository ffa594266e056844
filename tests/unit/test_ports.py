"""Ports that nothing else on the machine takes before a server binds them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from megarl.launch import ports


def bind(port: int, reuse: bool) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        server.bind(("127.0.0.1", port))
        server.listen()


def test_a_port_is_free_and_no_outgoing_connection_can_have_it() -> None:
    first = int(ports.EPHEMERAL.read_text().split()[0])
    found = {ports.reserve_port("127.0.0.1") for _ in range(20)}
    assert len(found) == 20 and all(first - ports.SPAN <= port < first for port in found)


def test_fault_16_a_reserved_port_is_for_its_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the draw and the server's bind, which takes minutes where a model is loaded first."""
    port = ports.reserve_port("127.0.0.1")
    with pytest.raises(OSError, match="in use"):
        bind(port, reuse=False)
    drawn = iter([port, port, port - 1, port - 2])
    monkeypatch.setattr(ports.random.SystemRandom, "randrange", lambda self, *range_: next(drawn))
    assert ports.reserve_port("127.0.0.1") in (port - 1, port - 2)
    bind(port, reuse=True)
    dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("text", ["1024\t65535\n", None])
def test_a_kernel_that_leaves_no_room(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "range"
    if text:
        path.write_text(text)
    monkeypatch.setattr(ports, "EPHEMERAL", path)
    bind(ports.reserve_port("127.0.0.1"), reuse=True)
