"""How the hosts of a run reach each other: addresses, and the interface behind one. As Debian and Ubuntu install them,
a host's own name means 127.0.1.1 to itself and its address to all others.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time

import psutil

from megarl.announce import announce
from megarl.errors import UserError

# Of a peer whose network is gone: first probe after so long, the next each so often, lost after so many.
PROBES = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))
SILENT_S = 30  # in all; also for what was sent and is not acknowledged
LOCAL = ("127.0.0.1", "localhost")  # given for a run on one host
TELLS_S = 5.0  # after so long a wait for a name's address is told of


def host_and_port(store: str) -> tuple[str, int]:
    """The parts of launch.store."""
    host, _, port = store.rpartition(":")
    return host, int(port)


def spans_hosts() -> bool:
    """Whether torchrun's ranks, this one among them, are on several hosts."""
    return os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1")


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def resolve(host: str, interface: str | None = None, within_s: float = 0.0) -> str:
    """The IPv4 address of `host`; where `host` is our own name and means loopback, the one by which others know it, on
    `interface` if that is given. A name that means nothing yet is asked for again for `within_s`: of a pod that starts
    later, say. OSError in the end.
    """
    begun, told = time.monotonic(), False
    while True:
        try:
            address = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
            break
        except socket.gaierror:
            waited_s = time.monotonic() - begun
            if waited_s > within_s:
                raise
            if waited_s > TELLS_S and not told:
                told = True
                announce(f"megarl: waiting for an address of host {host!r}, up to {within_s:g} s: is the name right?")
            time.sleep(0.5)
    return str(address) if host in LOCAL or not is_loopback(str(address)) else own_address(None, interface)


def own_address(towards: str | None = None, interface: str | None = None) -> str:
    """This host's address: on `interface`, else the one that routes to `towards`, else the one that others know.

    UserError where there is no such interface, or it has no address, or several may be meant.
    """
    if interface:
        return _on(interface)
    if towards is not None and (address := _routed(towards)) and (not is_loopback(address) or towards in LOCAL):
        return address
    outer = {name: _on(name) for name in interfaces() if name != "lo" and not is_loopback(_on(name))}
    if not outer:
        return "127.0.0.1"
    if len(outer) != 1:
        routed = _routed("192.0.2.1")  # of no host: what has the default route
        if routed not in outer.values():
            raise UserError(
                f"host {socket.gethostname()} has {len(outer)} networks ({', '.join(outer)}) and its own "
                "name means none of them: set launch.interface"
            )
        return str(routed)
    return next(iter(outer.values()))


def listen_at(host: str, port: int) -> socket.socket:
    """A listening socket at `host` alone, for a store: c10d's own would take every address of this machine."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(4096)
    except OSError:
        listening.close()
        raise
    return listening


def interfaces() -> list[str]:
    """Those of this host that have an IPv4 address, by name."""
    return [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.family == socket.AF_INET for address in addresses)
    ]


def interface_with(address: str) -> str:
    """The interface of this host that has `address`. UserError where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    if is_loopback(address):
        return "lo"
    raise UserError(f"no interface of host {socket.gethostname()} has the address {address}")


def set_interface(interface: str | None, towards: str) -> dict[str, str]:
    """The environment by which gloo and NCCL take `interface`; without one, gloo the network that leads to the host
    `towards`, and NCCL what it finds, which may be several at once, InfiniBand first.

    Left alone gloo listens where the host's own name points, which may be loopback. UserError where `interface` is none
    of this host's.
    """
    if interface:
        _on(interface)
        return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}  # without = eth1 is eth10, too
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    return {"GLOO_SOCKET_IFNAME": interface_with(own_address(towards))}


def watch(connected: socket.socket) -> None:
    """A peer whose host is gone without a word is noticed within SILENT_S, whether something is on its way or not."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in PROBES:
        connected.setsockopt(socket.IPPROTO_TCP, option, value)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENT_S)


def _on(interface: str) -> str:
    for entry in psutil.net_if_addrs().get(interface, []):
        if entry.family == socket.AF_INET:
            return entry.address
    raise UserError(
        f"launch.interface {interface!r} is no network interface of host {socket.gethostname()} with an IPv4 address; "
        f"it has {', '.join(interfaces())}"
    )


def _routed(towards: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 1))
            return str(probe.getsockname()[0])
        except OSError:  # no route, or a name that means nothing
            return None
