"""The supervisor over real processes: who ends whom, what is told, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megarl.launch.backoff import Backoff
from megarl.launch.lifeline import descendants
from megarl.launch.supervisor import ended_text

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
SLEEP = "import time; time.sleep(600)"
# A child that leaves a grandchild in a session of its own, as vLLM's engine process is.
PARENT = (
    f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True); "
    "time.sleep(600)"
)


def supervisor(
    tmp_path: Path,
    main: str,
    helpers: list[str],
    before: str = "",
    grace_s: float = 1.0,
    stop_s: float = 0.0,
    max_restarts: int = 0,
    again: str = "lambda code: None",
) -> subprocess.Popen[str]:
    """A process that supervises `main` and `helpers`, given as Python
    code; MARK in the environment finds what it leaves behind.
    """
    code = f"""
    import sys
    from pathlib import Path
    from megarl.launch.supervisor import Process, supervise
    def process(name, code):
        return Process(name, [sys.executable, "-c", code], Path({str(tmp_path)!r}) / (name + ".log"), stdout_to_terminal=name == "main")
    {before}
    sys.exit(supervise(process("main", {main!r}), [process(f"helper{{i}}", c) for i, c in enumerate({helpers!r})], grace_s={grace_s}, stop_s={stop_s}, max_restarts={max_restarts}, again={again}))
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "MARK": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(tmp_path: Path) -> list[str]:
    """Command lines of live processes that carry the mark of this test."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if f"MARK={tmp_path}\0".encode() in (entry / "environ").read_bytes() + b"\0":
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


def wait_for(tmp_path: Path, count: int) -> None:
    until = time.monotonic() + 60
    while len(left_behind(tmp_path)) != count:
        assert time.monotonic() < until, left_behind(tmp_path)
        time.sleep(0.05)


def test_a_clean_end_of_main_ends_the_helpers(tmp_path: Path) -> None:
    run = supervisor(tmp_path, "print('done')", [SLEEP, PARENT])
    out, err = run.communicate(timeout=300)
    assert (run.returncode, out, err) == (0, "done\n", "")
    assert left_behind(tmp_path) == []


def test_a_helper_that_dies_ends_all_and_is_named_with_its_log(tmp_path: Path) -> None:
    run = supervisor(tmp_path, PARENT, ["import sys; print('last words'); sys.exit(7)", SLEEP])
    _, err = run.communicate(timeout=300)
    assert run.returncode == 7
    assert err.startswith("megarl: error: helper0 exited with status 7; all processes are being ended; last lines of ")
    assert err.endswith("last words\n")
    assert left_behind(tmp_path) == []


ONCE = """
import os, signal, sys, time
from pathlib import Path
from megarl.announce import answers_line
starts = Path({starts!r})
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
{before}
print(answers_line(0, "here"), flush=True)
if len(starts.read_text()) <= {failures}: {fault}
time.sleep(600)
"""


def answering(tmp_path: Path, fault: str, failures: int = 1, before: str = "") -> tuple[str, str]:
    """A helper that has `failures` starts which end by `fault`, and a main that ends well after one more."""
    starts = tmp_path / "starts"
    main = f"import os, time\nwhile not os.path.exists({str(starts)!r}) or len(open({str(starts)!r}).read()) <= {failures}: time.sleep(0.05)"
    return ONCE.format(starts=str(starts), before=before, failures=failures, fault=fault), main


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_a_helper_that_answered_and_was_killed_is_started_again(tmp_path: Path, number: str) -> None:
    helper, main = answering(tmp_path, f"os.kill(os.getpid(), signal.{number})")
    run = supervisor(
        tmp_path,
        main,
        [helper],
        before="from megarl.launch import supervisor; supervisor.STOPPED_S = 0.2",
        max_restarts=1,
    )
    out, err = run.communicate(timeout=300)
    assert (run.returncode, out) == (0, "")
    assert err.startswith("megarl: helper0 was killed by SIGKILL; its log is ") and err.endswith("again in 1 s\n")
    assert left_behind(tmp_path) == []


def test_a_helper_that_answered_and_gave_up_leaves_the_rest_alone(tmp_path: Path) -> None:
    helper, _ = answering(tmp_path, "sys.exit(1)")
    run = supervisor(tmp_path, "import time; time.sleep(3)", [helper], max_restarts=3)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0 and (tmp_path / "starts").read_text() == "x"
    assert err.startswith("megarl: helper0 exited with status 1; ") and err.endswith("; no more is started\n")


def test_a_helper_that_was_killed_before_it_ever_answered_ends_all(tmp_path: Path) -> None:
    helper, _ = answering(tmp_path, "pass", before="os.kill(os.getpid(), signal.SIGKILL)")
    run = supervisor(tmp_path, SLEEP, [helper], max_restarts=3)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 1 and err.startswith("megarl: error: helper0 was killed by SIGKILL")


def test_starts_again_after_longer_and_longer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("megarl.launch.backoff.time.monotonic", lambda: clock[0])
    tries = Backoff(7)
    assert [tries.next() for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, None]
    tries.began()
    clock[0] = 700.0
    assert tries.next() == 1, "what ran for ten minutes has not failed in a row"
    assert Backoff(0).next() is None


def test_what_a_process_said_itself_is_the_message(tmp_path: Path) -> None:
    says = "import sys; print('noise'); print('megarl: error: port 7 is taken; give another'); sys.exit(2)"
    run = supervisor(tmp_path, SLEEP, [says])
    _, err = run.communicate(timeout=300)
    assert (run.returncode, err) == (2, "megarl: error: port 7 is taken; give another\n")


def test_a_helper_may_leave_with_0_before_main_does(tmp_path: Path) -> None:
    run = supervisor(tmp_path, "import time; time.sleep(1)", ["pass"])
    assert run.wait(timeout=300) == 0


def test_a_main_that_is_killed_gives_status_1(tmp_path: Path) -> None:
    run = supervisor(tmp_path, "import os; os.kill(os.getpid(), 9)", [SLEEP])
    _, err = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "main was killed by SIGKILL" in err
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything(tmp_path: Path, signum: signal.Signals, status: int) -> None:
    run = supervisor(tmp_path, PARENT, [STUBBORN, SLEEP])
    wait_for(tmp_path, 5)
    run.send_signal(signum)
    assert run.wait(timeout=300) == status
    assert left_behind(tmp_path) == []


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    armed = STUBBORN.replace("time.sleep", "print('ready', flush=True); time.sleep")  # before that SIGTERM ends it
    run = supervisor(tmp_path, armed, [armed], grace_s=60)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    until, log = time.monotonic() + 300, tmp_path / "helper0.log"
    while not (log.exists() and "ready" in log.read_text(encoding="utf-8")) and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=300) == 130
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_a_main_that_is_killed_is_started_again_and_the_helpers_live_on(tmp_path: Path, number: str) -> None:
    """What is left of the first start, in a session of its own, is ended before the second."""
    main = (
        "import os, pathlib, signal, subprocess, sys\n"
        f"seen, helper = [pathlib.Path({str(tmp_path)!r}) / name for name in ('seen', 'helper')]\n"
        "if not seen.exists():\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)\n"
        "    seen.write_text(str(child.pid))\n"
        "    while not helper.exists() or not helper.read_text(): pass\n"
        f"    os.kill(os.getpid(), signal.{number})\n"
        "print(os.path.exists('/proc/' + seen.read_text()), os.path.exists('/proc/' + helper.read_text()))\n"
    )
    helper = (
        f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, 'helper').write_text(str(os.getpid())); "
        "time.sleep(600)"
    )
    before = "from megarl.launch import supervisor; supervisor.STOPPED_S = 0.2"
    run = supervisor(tmp_path, main, [helper], before=before, again="lambda code: 0.1 if code == -9 else None")
    out, err = run.communicate(timeout=300)
    assert (run.returncode, out, err) == (0, "False True\n", "")
    assert left_behind(tmp_path) == []


ASKED = """
import signal, sys, time
def save(*_):
    time.sleep({seconds}); print("saved", flush=True); sys.exit(3)
signal.signal(signal.SIGUSR1, save)
print("ready", flush=True)
while True: time.sleep(0.1)
"""


@pytest.mark.parametrize(("seconds", "signals", "saved"), [(0.5, 1, True), (600, 2, False), (600, 1, False)])
def test_fault_18_main_may_save_until_a_second_signal_or_its_time_is_over(
    tmp_path: Path, seconds: float, signals: int, saved: bool
) -> None:
    run = supervisor(tmp_path, ASKED.format(seconds=seconds), [SLEEP], stop_s=600 if saved or signals == 2 else 1)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    for _ in range(signals):
        run.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, err = run.communicate(timeout=300)
    assert (run.returncode, out) == (130, "saved\n" if saved else "")
    assert err.startswith("\nmegarl: SIGINT, ending all processes; what is not saved is saved first, at most ")
    assert left_behind(tmp_path) == []


def test_fault_16_a_full_disk_is_named_where_it_takes_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is full" not in ended_text("a rank failed", tmp_path / "log")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    said = f"megarl: error: a rank failed, and the disk of {str(tmp_path)!r} is full: make room there; all processes"
    assert ended_text("a rank failed", tmp_path / "log").startswith(said)


def test_kill_9_of_the_supervisor_leaves_no_process(tmp_path: Path) -> None:
    run = supervisor(tmp_path, SLEEP, [SLEEP, SLEEP])
    wait_for(tmp_path, 4)
    run.kill()
    wait_for(tmp_path, 0)


def test_a_program_that_does_not_exist_ends_what_was_started(tmp_path: Path) -> None:
    before = (
        "process = lambda name, code, p=process: p(name, code) if name != 'main' else Process(name, ['/nowhere'], "
        "p(name, code).log)"
    )
    run = supervisor(tmp_path, "", [SLEEP], before=before)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 1 and "/nowhere" in err
    assert left_behind(tmp_path) == []


def test_descendants_are_found_across_sessions() -> None:
    child = subprocess.Popen([sys.executable, "-c", PARENT])
    try:
        until = time.monotonic() + 60
        while len(found := descendants(child.pid)) != 1:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert child.pid in descendants(os.getpid()) and found[0] in descendants(os.getpid())
    finally:
        for pid in [*descendants(child.pid), child.pid]:
            os.kill(pid, signal.SIGKILL)
        child.wait()
