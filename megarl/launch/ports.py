"""TCP ports for servers that bind them only seconds later, when they have imported what they need."""

from __future__ import annotations

import random
import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
SPAN = 12_000
TRIES = 100


def free_port(host: str) -> int:
    """A port that is free on `host` now, drawn below those that the kernel gives to outgoing connections: none of these
    can take it meanwhile, and two that draw at once hardly meet."""
    first = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.is_file() else 32_768
    draw = random.SystemRandom()  # not `random`, which a seed makes the same in every process
    for _ in range(TRIES if first > 1_024 + SPAN else 0):
        port = draw.randrange(first - SPAN, first)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
                return port
            except OSError:
                continue
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
