"""What torchrun starts for every rank: `python -m megarl.launch.rank
LOG_DIR MODULE ARGUMENTS...` calls MODULE.main(ARGUMENTS).

Rank 0 keeps the terminal for its standard output. All other output goes to
LOG_DIR/trainer_RANK.log. A rank that fails appends one JSON line to LOG_DIR/failures.jsonl,
from which the supervisor tells the first cause from its echoes on the other ranks. torch elastic's own error files
(@record) have whole seconds, and echoes come within milliseconds; its redirects put each stream of each rank apart.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from megarl.errors import Stopped, UserError
from megarl.launch.lifeline import die_with_parent
from megarl.launch.stop import supervised

FAILURES = "failures.jsonl"


def log_path(log_dir: Path, rank: int) -> Path:
    return log_dir / f"trainer_{rank}.log"


def main(argv: list[str]) -> int:
    stacks_when_asked()
    die_with_parent(os.getppid())
    supervised()
    log_dir, module, arguments = Path(argv[0]), argv[1], argv[2:]
    rank = int(os.environ["RANK"])
    redirect(log_path(log_dir, rank), keep_stdout=rank == 0)
    try:
        return importlib.import_module(module).main(arguments)
    except UserError as error:
        line = f"megarl: error: {error}"
        reported = _report(log_dir, rank, line)
        _log(traceback.format_exc() if error.__cause__ else "", line)
        if not reported and rank == 0:
            print(line)  # a full disk takes neither report nor log; the terminal does
        return 2
    except Stopped as stopped:
        return 128 + stopped.signum
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # torch's CheckpointException is no Exception
        _report(log_dir, rank, None)
        _log(traceback.format_exc())
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()


def stacks_when_asked() -> None:
    """SIGUSR2 writes the stacks of all threads to standard error, wherever that goes then, and ends nothing."""
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # a handler in C: it needs no lock of Python's


def redirect(log: Path, keep_stdout: bool) -> None:
    """All output goes to `log` from here on; with keep_stdout, standard error alone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
        if not keep_stdout:
            os.dup2(file.fileno(), 1)


def _report(log_dir: Path, rank: int, user_error: str | None) -> bool:
    """False where the disk takes nothing."""
    try:
        with (log_dir / FAILURES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "rank": rank, "user_error": user_error}) + "\n")
    except OSError:
        return False
    return True


def _log(*texts: str) -> None:
    with contextlib.suppress(OSError):
        print(*filter(None, texts), sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # The peers of a failed rank block in destructors of process groups: leave without running them.
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if status:
        os._exit(status)
    sys.exit(0)
