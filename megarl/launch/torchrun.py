"""torchrun, quietly: same arguments, same ranks, but a failed rank
gives an exit status and a line in failures.jsonl, not a screenful.

`python -m megarl.launch.torchrun LOG_DIR TORCHRUN-ARGUMENTS...`
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous
from torch.distributed.run import parse_args, run

from megarl.addresses import listen_at
from megarl.launch.rank import FAILURES


def main(argv: list[str]) -> int:
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    log_dir = Path(argv[0])
    signal.signal(signal.SIGUSR1, _pass_on)
    if not hasattr(static_tcp_rendezvous, "TCPStore"):
        print("megarl: warning: the store of this torch's torchrun may listen at every address", file=sys.stderr)
    static_tcp_rendezvous.TCPStore = _store  # type: ignore[misc, assignment]
    try:
        run(parse_args(argv[1:]))
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        return _record(log_dir, {rank: failure.exitcode for rank, failure in error.failures.items()})
    return 0


def _store(
    host: str, port: int, nodes: int, is_master: bool, timeout: timedelta, *, multi_tenant: bool
) -> dist.TCPStore:
    """torchrun's own, of this host alone: at its address, where c10d would take every one of this machine."""
    descriptor = listen_at(host, port).detach()
    return dist.TCPStore(host, port, nodes, is_master, timeout, multi_tenant=multi_tenant, master_listen_fd=descriptor)


def _pass_on(number: int, frame: object) -> None:
    """To the ranks: a last checkpoint (launch/stop.py)."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "megarl.launch.rank" in child.cmdline():
                child.send_signal(number)


def _record(log_dir: Path, codes: dict[int, int]) -> int:
    """Writes ranks that a signal killed, which could not say so themselves; returns the status to exit with.

    SIGTERM is left out: with it torchrun itself ends the peers of a failed rank.
    """
    killed = {rank: code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
    with contextlib.suppress(OSError), (log_dir / FAILURES).open("a", encoding="utf-8") as file:  # a disk may be full
        for rank, code in killed.items():
            file.write(json.dumps({"time": time.time(), "rank": rank, "signal": -code}) + "\n")
    return 1 if killed else max(1, *codes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
