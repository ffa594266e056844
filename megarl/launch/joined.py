"""A trainer rank that an outer torchrun started (`torchrun ... -m megarl.train`): its log, and the line in which a
failure is told, once on the terminal of each host and whichever rank failed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from megarl.errors import Stopped, UserError
from megarl.launch.lock import owned
from megarl.launch.peers import WORDS_S, Peers, ended, joined
from megarl.launch.rank import log_path, redirect, stacks_when_asked
from megarl.launch.scratch import scratch
from megarl.launch.stop import leave

ECHO_S = 2 * WORDS_S  # a rank that only lost its peers waits so long for the word of the one that failed


def run_joined(
    log_dir: Path, interface: str | None, store_host: str, check: Callable[[], None], run: Callable[[], int]
) -> int:
    """check(), on all ranks, then run() with its output in LOG_DIR/trainer_RANK.log; rank 0 keeps the terminal for its
    standard output. Returns run()'s status, or raises Stopped; a failure ends the process here, with 2 for a UserError.
    """
    stacks_when_asked()
    rank = int(os.environ["RANK"])
    if not sys.warnoptions:  # megatron-core's, of what it imports: a dozen lines; `megarl run` ignores them too
        warnings.simplefilter("ignore")
    terminal = _Terminal()
    peers: Peers | None = None
    with contextlib.ExitStack() as stack:
        os.environ.update(stack.enter_context(scratch()))  # what a rank imports leaves folders; torchrun's own stay
        tempfile.tempdir = None  # asked for anew
        try:
            peers = joined(terminal.say, lambda: leave(1), interface, store_host)
            check()
            if rank == 0:
                stack.enter_context(owned(log_dir))
            peers.meet("the start")
            redirect(log_path(log_dir, rank), keep_stdout=rank == 0)
            status = run()
        except UserError as error:
            line, status = f"megarl: error: {error}", 2
            if error.__cause__:
                traceback.print_exc()
        except Stopped:
            if peers is not None:
                peers.close()
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            traceback.print_exc()
            where = f"trainer rank {rank} on host {socket.gethostname()}"
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            line, status = f"megarl: error: {where} failed: {what}; its log is {log_path(log_dir, rank)}", 1
            if peers is not None and isinstance(error, RuntimeError):  # as gloo's and c10d's
                peers.hear(ECHO_S)
        else:
            peers.close()
            return status
    terminal.say(peers.tell(line) if peers is not None else line, alone=peers is None)
    return leave(status)


class _Terminal:
    """What stderr was. One rank of a host speaks there: its first, but where that is rank 0 and lost, the second."""

    def __init__(self) -> None:
        self._local = int(os.environ.get("LOCAL_RANK", "0"))
        self._out = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        self._said = False

    def say(self, line: str, alone: bool = False) -> None:
        """Once, here and in the log. alone: no other rank knows."""
        if self._said:
            return
        self._said = True
        lost = self._local == 1 and ended(0, socket.gethostname()) in line
        logs = os.fstat(self._out.fileno()).st_ino != os.fstat(2).st_ino
        for stream, wanted in ((self._out, self._local == 0 or lost or alone), (sys.stderr, logs)):
            if wanted:
                with contextlib.suppress(OSError):
                    print(line, file=stream, flush=True)
