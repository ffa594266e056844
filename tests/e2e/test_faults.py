"""Faults in a real run: tools/faults.py with a few of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import LIMIT_S, ROOT


def test_a_run_outlives_what_fails_in_it(tmp_path: Path) -> None:
    """A server that stands still for a while in a sync, one that is killed there, and a rank that is killed while that
    server starts again: every step is done once, every prompt learnt from once, from the weights of its sync.
    """
    command = [sys.executable, "tools/faults.py", "--short", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT_S)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["injected"], summary["survived"]) == (3, 3), done.stdout + done.stderr
    assert (summary["lost"], summary["doubled"], done.returncode) == (0, 0, 0), done.stdout + done.stderr
    said = (tmp_path / "short" / "out.txt").read_text()
    assert "; 1 worker left" in said and "trainer rank 1 was killed by SIGKILL" in said
