"""Supervision, with small real processes for children: who ends whom,
how fast, with which status, and that nobody is left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megarl.config import load_config
from megarl.errors import UserError
from megarl.launch import processes
from megarl.launch.backoff import Backoff
from megarl.launch.lifeline import descendants
from megarl.launch.local import Restarts, explain_trainer, first_failure, launch
from megarl.launch.lock import owned
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
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (0, "done\n", "")
    assert left_behind(tmp_path) == []


def test_a_helper_that_dies_ends_all_and_is_named_with_its_log(tmp_path: Path) -> None:
    run = supervisor(tmp_path, PARENT, ["import sys; print('last words'); sys.exit(7)", SLEEP])
    _, err = run.communicate(timeout=60)
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
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, "")
    assert err.startswith("megarl: helper0 was killed by SIGKILL; its log is ") and err.endswith("again in 1 s\n")
    assert left_behind(tmp_path) == []


def test_a_helper_that_answered_and_gave_up_leaves_the_rest_alone(tmp_path: Path) -> None:
    helper, _ = answering(tmp_path, "sys.exit(1)")
    run = supervisor(tmp_path, "import time; time.sleep(3)", [helper], max_restarts=3)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 0 and (tmp_path / "starts").read_text() == "x"
    assert err.startswith("megarl: helper0 exited with status 1; ") and err.endswith("; no more is started\n")


def test_a_helper_that_was_killed_before_it_ever_answered_ends_all(tmp_path: Path) -> None:
    helper, _ = answering(tmp_path, "pass", before="os.kill(os.getpid(), signal.SIGKILL)")
    run = supervisor(tmp_path, SLEEP, [helper], max_restarts=3)
    _, err = run.communicate(timeout=60)
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
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (2, "megarl: error: port 7 is taken; give another\n")


def test_a_helper_may_leave_with_0_before_main_does(tmp_path: Path) -> None:
    run = supervisor(tmp_path, "import time; time.sleep(1)", ["pass"])
    assert run.wait(timeout=60) == 0


def test_a_main_that_is_killed_gives_status_1(tmp_path: Path) -> None:
    run = supervisor(tmp_path, "import os; os.kill(os.getpid(), 9)", [SLEEP])
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "main was killed by SIGKILL" in err
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything(tmp_path: Path, signum: signal.Signals, status: int) -> None:
    run = supervisor(tmp_path, PARENT, [STUBBORN, SLEEP])
    wait_for(tmp_path, 5)
    run.send_signal(signum)
    assert run.wait(timeout=60) == status
    assert left_behind(tmp_path) == []


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    run = supervisor(tmp_path, STUBBORN, [STUBBORN], grace_s=60)
    wait_for(tmp_path, 3)
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) == 130
    assert left_behind(tmp_path) == []


def test_a_main_that_is_killed_is_started_again_and_the_helpers_live_on(tmp_path: Path) -> None:
    """What is left of the first start, in a session of its own, is ended before the second."""
    main = (
        "import os, pathlib, subprocess, sys\n"
        f"seen, helper = [pathlib.Path({str(tmp_path)!r}) / name for name in ('seen', 'helper')]\n"
        "if not seen.exists():\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)\n"
        "    seen.write_text(str(child.pid))\n"
        "    while not helper.exists() or not helper.read_text(): pass\n"
        "    os.kill(os.getpid(), 9)\n"
        "print(os.path.exists('/proc/' + seen.read_text()), os.path.exists('/proc/' + helper.read_text()))\n"
    )
    helper = (
        f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, 'helper').write_text(str(os.getpid())); "
        "time.sleep(600)"
    )
    run = supervisor(tmp_path, main, [helper], again="lambda code: 0.1 if code == -9 else None")
    out, err = run.communicate(timeout=60)
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
    out, err = run.communicate(timeout=60)
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
    _, err = run.communicate(timeout=60)
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


RANKS = """
import os, sys, time
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from megarl.errors import UserError

def main(argv):
    dist.init_process_group("gloo")
    rank, what = dist.get_rank(), next(word for word in argv if word.startswith("sft.out=")).removeprefix("sft.out=")
    print("rank", rank, flush=True)
    dist.barrier()
    if rank == 1:
        if what == "raise":
            raise CheckpointException("boom", {0: (ValueError("boom"), None)})
        if what == "refuse":
            raise UserError("line 3 of the file is bad; mend it")
        if what == "killed":
            os.kill(os.getpid(), 9)
    if what == "wait":
        time.sleep(600)
    dist.barrier()
    return 0
"""


@pytest.fixture
def ranks(tmp_path: Path, run_yaml: Path):
    """`megarl sft` with two ranks of a module that fails on request, run as a command of its own."""
    (tmp_path / "ranks_module.py").write_text(RANKS)

    def start(what: str) -> subprocess.Popen[str]:
        code = (
            "import sys; from megarl.cli import MODULES, main; MODULES['sft'] "
            "= 'ranks_module'; "
            f"sys.exit(main(['sft', {str(run_yaml)!r}, 'launch.trainers=2', 'parallel.pp=1', 'sft.out={what}']))"
        )
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "MARK": str(tmp_path)}
        return subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("fine", 0, ""),
        ("raise", 1, "megarl: error: trainer rank 1 failed; all processes are being ended; last lines of"),
        ("refuse", 2, "megarl: error: line 3 of the file is bad; mend it"),
        (
            "killed",
            1,
            "megarl: error: trainer rank 1 was killed by SIGKILL; all processes are being ended; last lines of",
        ),
    ],
)
def test_ranks_under_torchrun(ranks, tmp_path: Path, what: str, status: int, message: str) -> None:
    run = ranks(what)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (status, f"starting 2 trainer ranks; logs in {tmp_path}/run/logs\nrank 0\n")
    assert (
        err.startswith(message)
        and (what != "raise" or "ValueError: boom" in err)
        and (status != 2 or err.count("\n") == 1)
    )
    assert (tmp_path / "run" / "logs" / "trainer_1.log").read_text().startswith("rank 1\n")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_the_command(ranks, tmp_path: Path, signum: signal.Signals) -> None:
    run = ranks("wait")
    assert run.stdout is not None and "logs in" in run.stdout.readline() and run.stdout.readline() == "rank 0\n"
    second = ranks("wait")
    assert second.wait(timeout=60) == 2
    assert second.stderr is not None and f"is in use by process {run.pid} on " in second.stderr.read()
    run.send_signal(signum)
    run.wait(timeout=60)
    wait_for(tmp_path, 0)


def test_the_first_cause_is_told_from_its_echoes(tmp_path: Path) -> None:
    def write(*failures: dict[str, object]) -> None:
        (tmp_path / "failures.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failures))

    assert explain_trainer(tmp_path) is None
    (tmp_path / "trainer_3.log").write_text("why\n")
    write({"time": 2.0, "rank": 0, "user_error": None}, {"time": 1.0, "rank": 3, "user_error": None})
    assert (explain_trainer(tmp_path) or "").endswith("why") and "rank 3 failed" in (explain_trainer(tmp_path) or "")
    write({"time": 1.0, "rank": 0, "user_error": None}, {"time": 2.0, "rank": 3, "signal": 9})
    assert "rank 3 was killed by SIGKILL" in (explain_trainer(tmp_path) or "")
    write(
        {"time": 1.0, "rank": 0, "user_error": "megarl: error: mend it"}, {"time": 2.0, "rank": 3, "user_error": None}
    )
    assert explain_trainer(tmp_path) == "megarl: error: mend it"


def test_what_trainers_are_started_again_for(
    tmp_path: Path, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = processes.make_plan("run", "m", load_config(run_yaml, ["launch.max_restarts=2"]), [str(run_yaml)])
    assert processes.make_plan("compare", "m", load_config(run_yaml), [str(run_yaml)]).trainer_restarts == 0
    plan.log_dir.mkdir(parents=True)
    done = [0]
    restarts, failures, run_dir = Restarts(plan, lambda: done[0]), plan.log_dir / "failures.jsonl", plan.log_dir.parent

    def after(code: int, **failure: object) -> float | None:
        failures.write_text(json.dumps({"time": 1.0, "rank": 1, **failure}) + "\n")
        return restarts.after(code)

    assert after(2, user_error="megarl: error: mend it") is None and restarts.after(143) is None
    assert after(1, user_error=None) is None  # a rank that raised before the first step
    failures.unlink()
    assert restarts.after(-signal.SIGTERM) is None and restarts.after(1) is None
    assert capsys.readouterr().err == ""
    assert after(1, signal=9) == 1.0 and not failures.exists()
    said = (
        "megarl: trainer rank 1 was killed by SIGKILL; the trainers start again from step 0, restart 1 of 2; logs in "
    )
    assert capsys.readouterr().err == f"{said}{plan.log_dir}\n"
    (run_dir / "checkpoints" / "step_4").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_4" / "megarl.json").write_text("{}")
    done[0] = 5
    assert after(1, user_error=None) == 2.0
    assert "rank 1 failed; the trainers start again from step 4, restart 2 of 2" in capsys.readouterr().err
    assert after(1, signal=9) is None
    assert first_failure(plan.log_dir) == {"time": 1.0, "rank": 1, "signal": 9}
    with failures.open("a") as file:
        file.write(json.dumps({"time": 2.0, "rank": 0, "stall": "no rank went on"}) + "\n")
    assert (explain_trainer(plan.log_dir) or "").startswith("megarl: error: no rank went on; ")


def test_the_plan_passes_one_store_to_both_sides(run_yaml: Path) -> None:
    config = load_config(run_yaml, ["rollout.engines=2"])
    planned = processes.make_plan("run", "m", config, [str(run_yaml), "rollout.engines=2"])
    stores = {
        word
        for process in [planned.trainer, *planned.rollouts]
        for word in process.argv
        if word.startswith("launch.store=")
    }
    assert len(planned.rollouts) == 2 and len(stores) == 1 and "127.0.0.1:" in stores.pop()
    assert planned.trainer.env["TORCHDYNAMO_DISABLE"] == "1" and "TORCHDYNAMO_DISABLE" not in planned.rollouts[0].env
    assert planned.trainer.env["GLOO_SOCKET_IFNAME"] == "lo"
    keys = ["launch.store=127.0.0.1:29600", "launch.interface=lo"]
    fixed = processes.make_plan("run", "m", load_config(run_yaml, keys), ["c.yaml"])
    assert not any(word.startswith("launch.store=") for word in fixed.trainer.argv)
    assert fixed.trainer.env["GLOO_SOCKET_IFNAME"] == fixed.rollouts[0].env["NCCL_SOCKET_IFNAME"] == "lo"
    with pytest.raises(UserError, match="launch.interface 'eth7' is no network interface of host .* it has lo"):
        processes.make_plan("run", "m", load_config(run_yaml, ["launch.interface=eth7"]), ["c.yaml"])


def test_logs_of_the_start_before_are_kept_once(tmp_path: Path, run_yaml: Path) -> None:
    config = load_config(run_yaml)
    for word in ("one", "two"):
        planned = processes.make_plan("sft", "m", config, [str(run_yaml)])
        planned.trainer.argv[:] = [sys.executable, "-c", f"import sys; print('{word}', file=sys.stderr)"]
        child = os.fork()  # supervise() adopts orphans for the life of its process: not in pytest's own
        if child == 0:
            os._exit(launch(planned))
        assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "run/logs/torchrun.log").read_text() == "two\n"
    assert (tmp_path / "run/logs.previous/torchrun.log").read_text() == "one\n"


def test_fault_11_a_rollout_worker_and_a_trainer_on_one_run_dir_have_logs_of_their_own(
    tmp_path: Path, run_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`megarl rollout` may come before `megarl train`, which begins its logs anew; a server that `megarl run` starts
    writes beside the ranks. Containers that share run.dir may have the same process ids."""
    from megarl import cli
    from megarl.launch.local import _fresh
    from megarl.server import worker

    chosen = []
    monkeypatch.setattr(worker, "run_rollout", lambda config, host, port, log_dir: chosen.append(log_dir) or 0)
    planned = processes.make_plan("run", "m", load_config(run_yaml), [str(run_yaml)])
    for argv in ([str(run_yaml), "launch.store=127.0.0.1:29600"], planned.rollouts[0].argv[4:]):
        assert cli.main(["rollout", *argv]) == 0
    alone, beside = chosen
    assert beside == planned.log_dir and alone != beside
    one, other = worker._open_log(alone), worker._open_log(alone)
    _fresh(planned.log_dir)
    _fresh(planned.log_dir)
    with one, other:
        assert one.name != other.name and Path(one.name).is_file() and Path(other.name).is_file()


def test_a_run_dir_in_use_is_refused(run_yaml: Path) -> None:
    run_dir = Path(load_config(run_yaml).run.dir)
    in_use = pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}; stop that one")
    with owned(run_dir / "a"), owned(run_dir / "b"), in_use, owned(run_dir / "a"):
        pass


def test_fault_12_a_run_dir_in_use_is_refused_under_an_outer_torchrun(tmp_path: Path, run_yaml: Path) -> None:
    """In processes of their own: a rank that fails leaves at once."""
    (tmp_path / "a_rank.py").write_text("def main(argv): return 0")
    code = "import sys; from megarl import cli; cli.MODULES['sft'] = 'a_rank'; sys.exit(cli.main(['sft', sys.argv[1]]))"

    def rank(number: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        env = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": "4", "RANK": number}
        argv = [sys.executable, "-c", code, str(run_yaml)]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)

    with owned(Path(load_config(run_yaml).run.dir) / "logs"):
        refused = rank("0")  # it speaks for all: its failure ends them
        assert refused.returncode == 2 and f"is in use by process {os.getpid()}" in refused.stderr
        assert rank("1").returncode == 0
    assert rank("0").returncode == 0


def test_fault_16_a_run_dir_that_cannot_be_made_is_one_line(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megarl import cli

    assert cli.main(["run", str(run_yaml), "run.dir=/proc/x/y"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("megarl: error: run.dir '/proc/x/y' cannot be ") and said.count("\n") == 1
