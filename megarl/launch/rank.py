"""What torchrun starts for every rank: `python -m megarl.launch.rank
LOG_DIR MODULE ARGUMENTS...` calls MODULE.main(ARGUMENTS).

Rank 0 keeps the terminal for its standard output. All other output goes to
LOG_DIR/trainer_RANK.log. A rank that fails appends one JSON line to LOG_DIR/failures.jsonl,
from which the supervisor tells the first cause from its echoes on the other ranks. torch elastic's own error files
(@record) have whole seconds, and echoes come within milliseconds; its redirects put each stream of each rank apart.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from megarl.errors import UserError
from megarl.launch.lifeline import die_with_parent

FAILURES = "failures.jsonl"


def log_path(log_dir: Path, rank: int) -> Path:
    return log_dir / f"trainer_{rank}.log"


def main(argv: list[str]) -> int:
    die_with_parent(os.getppid())
    log_dir, module, arguments = Path(argv[0]), argv[1], argv[2:]
    rank = int(os.environ["RANK"])
    _redirect(log_path(log_dir, rank), keep_stdout=rank == 0)
    try:
        return importlib.import_module(module).main(arguments)
    except UserError as error:
        _report(log_dir, rank, f"megarl: error: {error}")
        print(f"megarl: error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # torch's CheckpointException is no Exception
        _report(log_dir, rank, None)
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _redirect(log: Path, keep_stdout: bool) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
        if not keep_stdout:
            os.dup2(file.fileno(), 1)


def _report(log_dir: Path, rank: int, user_error: str | None) -> None:
    with (log_dir / FAILURES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), "rank": rank, "user_error": user_error}) + "\n")


if __name__ == "__main__":
    # The peers of a failed rank block in destructors of process groups: leave without running them.
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if status:
        os._exit(status)
    sys.exit(0)
