"""How long a rollout server may be silent, and how long answers take at most. Imports nothing heavy: refusals come
before torch is imported.
"""

from __future__ import annotations

from pathlib import Path

from megarl.checkpoints import size_of

STALE_S = 15.0  # a worker that has not beaten for so long is taken for dead
ANSWER_S = 10.0  # a server that takes longer to say its version is left out of a step and of a sync
ACCOUNT_S = 5.0  # how long a failure waits for the worker's own account of it
ENGINE_ACCOUNT_S = 60.0  # the same where its engine died
# A request may be what kills the engines that it meets. It is given up once so many servers were lost by what may be
# its doing: while it was at work there the engine died, the connection broke, or the answer did not come in time (a
# limit that is too short would else be met without end). A server that was not reached, whose host is silent, that the
# watch or a sync takes out, or that leaves, does not count.
TRIES = 3
READ_BYTES_S = 100e6  # a server reads an export at least so fast
CHECKPOINT_BYTES_S = 10e6  # a rank writes and reads its share of a checkpoint at least so fast


def longest_wait_s(request_timeout_s: float) -> float:
    """For one answer, where each server that has the request falls silent; a minute more for what follows."""
    return TRIES * request_timeout_s + 60


def checkpoint_s(share: float) -> float:
    """How long a rank may take for its share of a checkpoint, in bytes: written and read back for its checksums, or
    read for those and then loaded.
    """
    return 2 * share / CHECKPOINT_BYTES_S


def resuming_s(checkpoint: Path, ranks: int) -> float:
    """How long `ranks` may take to read a checkpoint for its checksums and to load it."""
    return checkpoint_s(size_of(checkpoint) / ranks)


def reading_s(folder: Path) -> float:
    """How long a server may take to read the files in `folder`."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sum(file.stat().st_size for file in files if file.is_file()) / READ_BYTES_S
