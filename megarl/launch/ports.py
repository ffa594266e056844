"""TCP ports for servers that bind them only seconds or minutes later, when they have imported what they need.

A port is held from the draw on by a socket that is bound and never listens. A server that sets SO_REUSEADDR, as
c10d's stores and vLLM's do, may bind beside it; whoever draws a free port, this module in another process included,
gets another.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
SPAN = 12_000
TRIES = 100


_reserved: list[socket.socket] = []


def reserve_port(host: str) -> int:
    """A port of `host` for a server of ours, held until this process ends. It is drawn below those that the kernel
    gives to outgoing connections. Raises OSError where `host` is no address of this machine.
    """
    first = int(EPHEMERAL.read_text(encoding="utf-8").split()[0]) if EPHEMERAL.is_file() else 32_768
    draw = random.SystemRandom()  # not `random`, which a seed makes the same in every process
    holder = socket.socket()
    for _ in range(TRIES if first > 1_024 + SPAN else 0):
        try:
            holder.bind((host, draw.randrange(first - SPAN, first)))
            break
        except OSError:
            continue
    else:
        holder.bind((host, 0))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after bind(): two holders must not share a port
    _reserved.append(holder)
    return int(holder.getsockname()[1])
