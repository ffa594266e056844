"""tools/bench/cpu_seconds.py counts the CPU time of a command's processes, step by step."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.cpu_seconds import CpuWatch, Sample, a_step, seconds_below  # noqa: E402

# From the third step on a child works for half a second of CPU, and ends before the row is written.
STEPS = """
import subprocess, sys
work = "import time\\nwhile time.process_time() < 0.5: pass"
for step in range(4):
    if step >= 2:
        subprocess.run([sys.executable, "-S", "-c", work], check=True)
    with open(sys.argv[1], "a") as out:
        out.write("{}\\n")
    sys.stdin.readline()
"""


def test_the_warm_up_and_what_follows_the_last_step_are_left_out() -> None:
    samples = [Sample(1, 40.0), Sample(2, 41.0), Sample(3, 42.0), Sample(4, 42.5), Sample(6, 43.5)]
    assert a_step(samples, warm_up=3) == 0.5


def test_steps_that_were_not_seen_are_divided_by() -> None:
    assert a_step([Sample(2, 9.0), Sample(5, 10.0), Sample(7, 14.0)], warm_up=3) == 2.0
    with pytest.raises(ValueError, match="too few steps after 3"):
        a_step([Sample(2, 9.0), Sample(4, 10.0)], warm_up=3)


def test_processes_that_ended_are_counted(tmp_path: Path) -> None:
    with CpuWatch(tmp_path / "rows") as watch:
        command = [sys.executable, "-S", "-c", STEPS, str(tmp_path / "rows")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as child:
            assert child.stdin is not None
            deadline = time.monotonic() + 60.0
            for step in range(1, 5):
                while len(watch.samples) < step and time.monotonic() < deadline:
                    time.sleep(0.01)
                child.stdin.write("\n")
                child.stdin.flush()
    assert [sample.rows for sample in watch.samples] == [1, 2, 3, 4]
    assert 0.45 < a_step(watch.samples, warm_up=2) < 0.9


def test_a_process_that_nobody_has_waited_for_is_counted_once() -> None:
    before = seconds_below()
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time\nwhile time.process_time() < 0.3: pass"])
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    ended = seconds_below() - before
    child.wait()
    assert ended == pytest.approx(seconds_below() - before, abs=0.021) and ended > 0.25
