"""Which address and interface a host of a run has for the others, as its own tables say."""

from __future__ import annotations

import socket
from collections import namedtuple

import psutil
import pytest

from megarl import addresses
from megarl.errors import UserError

Address = namedtuple("Address", "family address")


def host(monkeypatch: pytest.MonkeyPatch, networks: dict[str, str], names: dict[str, str], routed: str | None) -> None:
    """This machine has these interfaces and these names; to all other addresses it goes from `routed`."""
    found = {name: [Address(socket.AF_INET, address)] for name, address in networks.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [Address(socket.AF_INET, "127.0.0.1")], **found})
    monkeypatch.setattr(socket, "gethostname", lambda: "node0")

    def getaddrinfo(name: str, *args: object) -> list[tuple]:
        if name not in names and not name[0].isdigit():
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names.get(name, name), 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    def route(towards: str) -> str | None:
        address = names.get(towards, towards)
        return address if address in networks.values() else "127.0.0.1" if address.startswith("127.") else routed

    monkeypatch.setattr(addresses, "_routed", route)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_a_host_whose_own_name_means_loopback_has_the_address_that_others_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's and Ubuntu's default: gloo, left alone, would listen on 127.0.1.1."""
    names = {"node0": "127.0.1.1", "node1": "10.0.0.2", "localhost": "127.0.0.1"}
    host(monkeypatch, {"eth0": "10.0.0.1"}, names, "10.0.0.1")
    assert addresses.resolve("node0") == "10.0.0.1" and addresses.resolve("node1") == "10.0.0.2"
    assert addresses.resolve("localhost") == addresses.resolve("127.0.0.1") == "127.0.0.1"
    assert addresses.own_address("node0") == addresses.own_address("node1") == addresses.own_address() == "10.0.0.1"
    assert addresses.set_interface(None, "node0") == addresses.set_interface(None, "node1")
    assert addresses.set_interface(None, "node1") == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert addresses.set_interface(None, "127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert addresses.set_interface(None, "node1") == {}


def test_of_several_networks_the_key_or_the_route_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"node0": "127.0.1.1", "node1": "10.1.0.2"}
    host(monkeypatch, {"eth0": "10.0.0.1", "eth1": "10.1.0.1"}, names, "10.1.0.1")
    assert addresses.own_address("node1") == "10.1.0.1" and addresses.own_address("node1", "eth0") == "10.0.0.1"
    assert addresses.resolve("node0", "eth0") == "10.0.0.1"
    for_nccl = "=eth0"  # NCCL takes a name for the beginning of one
    assert addresses.set_interface("eth0", "node1") == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": for_nccl}
    with pytest.raises(UserError, match="'eth7' is no network interface of host node0 .*; it has lo, eth0, eth1$"):
        addresses.set_interface("eth7", "node1")
    host(monkeypatch, {"eth0": "10.0.0.1", "eth1": "10.1.0.1"}, names, None)
    with pytest.raises(
        UserError, match=r"host node0 has 2 networks \(eth0, eth1\) and its own name .*launch.interface"
    ):
        addresses.resolve("node0")


def test_a_name_that_means_nothing_yet_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, str] = {}
    host(monkeypatch, {"eth0": "10.0.0.1"}, names, "10.0.0.1")
    with pytest.raises(socket.gaierror):
        addresses.resolve("pod-0")
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: names.setdefault("pod-0", "10.0.0.9"))
    assert addresses.resolve("pod-0", within_s=60) == "10.0.0.9"


def test_a_wait_for_a_name_is_told_of_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    host(monkeypatch, {"eth0": "10.0.0.1"}, {}, "10.0.0.1")
    monkeypatch.setattr(addresses.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    with pytest.raises(socket.gaierror):
        addresses.resolve("pod-0", within_s=60)
    assert capsys.readouterr().out == (
        "megarl: waiting for an address of host 'pod-0', up to 60 s: is the name right?\n"
    )


def test_ranks_of_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for local, world, several in (("8", "8", False), ("8", "16", True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        monkeypatch.setenv("WORLD_SIZE", world)
        assert addresses.spans_hosts() is several
