from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megarl.launch import scratch as module
from megarl.launch.scratch import scratch

HOLDER = """
import sys, time
from megarl.launch.scratch import scratch
with scratch() as env:
    print(env["TMPDIR"], flush=True)
    time.sleep(600)
"""


def test_what_processes_leave_is_removed_also_after_kill_9(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short := Path("/tmp") / f"s{os.getpid()}").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    (short / "megarl_of_the_user").mkdir()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(short)}
        ) as holder:
            assert holder.stdout is not None
            other = Path(holder.stdout.readline().strip())
            with scratch() as env:
                (Path(env["TMPDIR"]) / "socket").touch()
                assert (
                    env["VLLM_RPC_BASE_PATH"] == env["TMPDIR"] and Path(env["TMPDIR"]).parent == short == other.parent
                )
                assert not env["TORCHINDUCTOR_CACHE_DIR"].startswith(env["TMPDIR"])
            assert not Path(env["TMPDIR"]).exists() and other.exists()
            holder.send_signal(signal.SIGKILL)
        assert other.exists()
        with scratch():
            assert not other.exists()
        assert [path.name for path in short.iterdir()] == ["megarl_of_the_user"]
    finally:
        subprocess.run(["rm", "-r", str(short)], check=True)


def test_a_socket_of_vllm_fits_where_the_temporary_directory_is_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "d" * 80)
    with scratch() as env:
        assert Path(env["TMPDIR"]).parent == Path("/tmp")
        assert len(env["TMPDIR"]) + 37 < module.SOCKET_BYTES
