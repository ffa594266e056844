"""The run's store, as rank 0 opens it and as a rollout worker finds it (launch.store)."""

from __future__ import annotations

import time

import torch.distributed as dist

from megarl.addresses import LOCAL, host_and_port, own_address, resolve
from megarl.announce import announce
from megarl.config import Config
from megarl.door import verified
from megarl.errors import UserError
from megarl.rollout.registry import OPEN, STRANGERS, open_store

KNOWN_WITHIN_S = 5.0  # from a store's opening to rank 0's word in it


def open_run_store(config: Config, *, spans_hosts: bool) -> tuple[dist.TCPStore, tuple[str, int]]:
    """The store, opened on rank 0's host, and the address at which all others find it. Port 0 is drawn here, and
    printed. UserError where launch.store is another host's.
    """
    given, interface, within_s = config.launch.store, config.launch.interface, config.rollout.start_timeout_s
    host, port = host_and_port(given)
    try:
        unset = port == 0 and host in LOCAL and spans_hosts
        address = own_address(None, interface) if unset else resolve(host, interface, within_s)
    except OSError as error:
        raise UserError(f"launch.store {given!r}: {host!r} is no host's name here ({error.strerror})") from None
    store = open_store(address, port, is_master=True, timeout_s=within_s)
    if port == 0:
        announce(f"the run's store is open: megarl rollout CONFIG launch.store={address}:{store.port}")
    return store, (address, store.port)


def refuse_foreign(store: dist.Store, name: str) -> None:
    """UserError where `store` is no store of a run, or of one with another secret."""
    deadline = time.monotonic() + KNOWN_WITHIN_S
    while not store.check([OPEN]):
        if time.monotonic() > deadline:
            raise UserError(
                f"launch.store {name}: the store there is no run's, but maybe torchrun's own: give the trainers' "
                "launch.store, another port than --master-port and --rdzv-endpoint"
            )
        time.sleep(0.1)
    if verified(OPEN, store.get(OPEN)) is None:
        store.add(STRANGERS, 1)
        raise UserError(
            f"launch.store {name}: the run there has another MEGARL_TOKEN than this worker: set the same on all hosts "
            "(docs/security.md)"
        )
