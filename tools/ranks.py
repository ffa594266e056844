"""Real ranks on this host, by torchrun over gloo: what tools and tests start them by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megarl.launch.malloc import huge_pages  # noqa: E402

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    **huge_pages(),
}


def launch_ranks(
    script: str | Path, world: int, *arguments: str, capture: bool = True, timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """`script ARGUMENTS...` on each of `world` ranks. The caller judges the exit status; without `capture` the ranks
    write to this terminal.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(script)]
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, **ENVIRONMENT},
        cwd=ROOT,
        capture_output=capture,
        text=True,
        timeout=timeout_s,
    )
