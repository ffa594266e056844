"""A command's processes on this host: its plan, ranks under torchrun, the first cause of a failure, its run.dir."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.config import load_config
from megarl.door import RUN_SECRET
from megarl.errors import UserError
from megarl.launch import processes
from megarl.launch.local import Restarts, explain_trainer, first_failure, launch
from megarl.launch.lock import owned
from megarl.launch.starts import is_over
from tests.unit.test_supervisor import left_behind, wait_for

RANKS = """
import errno, os, socket, sys, time
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from megarl.errors import UserError

def main(argv):
    dist.init_process_group("gloo")
    rank, what = dist.get_rank(), next(word for word in argv if word.startswith("sft.out=")).removeprefix("sft.out=")
    print("rank", rank, flush=True)
    dist.barrier()
    with socket.socket() as stranger:  # another address of this host: torchrun's store is not there
        assert stranger.connect_ex(("127.0.0.2", int(os.environ["MASTER_PORT"]))) == errno.ECONNREFUSED
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
    out, err = run.communicate(timeout=300)
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
    assert second.wait(timeout=300) == 2
    assert second.stderr is not None and f"is in use by process {run.pid} on " in second.stderr.read()
    run.send_signal(signum)
    run.wait(timeout=300)
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
    with (tmp_path / "failures.jsonl").open("a") as file:
        file.write('{"time": 0.5, "ra')  # by a full disk, or a kill
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
    assert after(1, user_error=None) == 1.0, "a start that got further than the one before it"
    assert "rank 1 failed; the trainers start again from step 4, restart 1 of 2" in capsys.readouterr().err
    assert after(1, signal=9) == 2.0 and after(1, signal=9) is None
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
    assert planned.trainer.env["GLIBC_TUNABLES"] == os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    keys = ["launch.store=127.0.0.1:29600", "launch.interface=lo"]
    fixed = processes.make_plan("run", "m", load_config(run_yaml, keys), ["c.yaml"])
    assert not any(word.startswith("launch.store=") for word in fixed.trainer.argv)
    assert (fixed.trainer.env["GLOO_SOCKET_IFNAME"], fixed.rollouts[0].env["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    with pytest.raises(UserError, match="launch.interface 'eth7' is no network interface of host .* it has lo"):
        processes.make_plan("run", "m", load_config(run_yaml, ["launch.interface=eth7"]), ["c.yaml"])


@pytest.mark.parametrize("secret", ["", "of the user"])
def test_a_train_alone_says_where_workers_join_and_makes_no_secret(
    secret: str, run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Workers that others start know the printed port and what their own shell exports, no more."""
    monkeypatch.setenv(RUN_SECRET, secret)
    planned = processes.make_plan("train", "m", load_config(run_yaml), [str(run_yaml)])
    [store] = [word for word in planned.trainer.argv if word.startswith("launch.store=")]
    planned.trainer.argv[:] = [sys.executable, "-c", f"import os; print(repr(os.environ['{RUN_SECRET}']))"]
    child = os.fork()
    if child == 0:
        os._exit(launch(planned))
    assert os.waitpid(child, 0)[1] == 0
    said = capfd.readouterr().out
    assert f"rollout workers join by megarl rollout CONFIG {store}{secret and ' and this MEGARL_TOKEN'}\n" in said
    assert f"{secret!r}\n" in said


def test_who_finds_a_port_and_a_secret_by_itself(run_yaml: Path) -> None:
    config = load_config(run_yaml)
    for command, drawn in (("run", True), ("compare", True), ("sft", False), ("score", False)):
        planned = processes.make_plan(command, "m", config, [str(run_yaml)])
        assert any(word.startswith("launch.store=") for word in planned.trainer.argv) == drawn
        assert planned.store == "" and bool(planned.rollouts) == drawn


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


def test_a_run_refused_for_anothers_lock_makes_no_page_of_that_one(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megarl import cli

    run_dir = Path(load_config(run_yaml).run.dir)
    with owned(run_dir / "logs"):
        (run_dir / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
        assert cli.main(["run", str(run_yaml)]) == 2
        said = capsys.readouterr()
        assert "is in use by process" in said.err and said.out == "" and not (run_dir / "report.html").exists()


def test_fault_12_a_run_dir_in_use_is_refused_under_an_outer_torchrun(tmp_path: Path, run_yaml: Path) -> None:
    """In processes of their own: a rank that fails leaves at once. Nothing stays in the temporary directory."""
    (tmp_path / "a_rank.py").write_text("import tempfile\ndef main(argv): return int(not tempfile.mkdtemp())")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    code = (
        "import sys, warnings; from megarl import cli, refusals; cli.MODULES['sft'] = 'a_rank'; "
        "check = refusals.check; "
        "refusals.check = lambda *given, **named: warnings.warn('noise') or check(*given, **named); "
        "sys.exit(cli.main(['sft', sys.argv[1]]))"
    )

    def rank(number: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        env = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": "4", "RANK": number, "TMPDIR": str(temporary)}
        argv = [sys.executable, "-c", code, str(run_yaml)]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)

    with owned(Path(load_config(run_yaml).run.dir) / "logs"):
        refused = rank("0")  # it speaks for all: its failure ends them
        assert refused.returncode == 2 and f"is in use by process {os.getpid()}" in refused.stderr
        assert refused.stderr.count("\n") == 1, "one line, without the warnings of what is imported"
        assert rank("1").returncode == 0
    assert rank("0").returncode == 0
    assert not [*temporary.iterdir()]


def test_fault_16_a_run_dir_that_cannot_be_made_is_one_line() -> None:
    refused = pytest.raises(UserError, match=r"^run.dir '/proc/x/y' cannot be made or written \(.*\); give a folder ")
    with refused, owned(Path("/proc/x/y/logs")):
        pass


def test_fault_16_a_full_disk_at_the_start_is_one_line(run_yaml: Path) -> None:
    """A limit on the size of a file stops the writer as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        full = pytest.raises(UserError, match=r"^run.dir '.*' cannot be written \(File too large\): make room there$")
        with full, owned(Path(load_config(run_yaml).run.dir) / "logs"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_system_without_locks_is_told_of(
    run_yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre's default on many clusters: the start ended in a traceback."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with owned(Path(load_config(run_yaml).run.dir) / "logs"):
        assert "cannot be locked (Function not implemented)" in capsys.readouterr().out


def test_a_rank_leaves_wandb_to_its_logger() -> None:
    """megatron-core would import it in every rank, by every way to start one."""
    code = "import sys, megarl.train, megarl.commands.sft; assert 'wandb' not in sys.modules; import wandb"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("error", "gave_up", "starts", "over"),
    [
        (None, False, ("0", "3"), True),
        (None, True, ("0", "3"), False),
        (None, True, ("3", "3"), True),
        (UserError("the disk is full"), False, ("2", "3"), False),
        (UserError("the disk is full"), False, ("3", "3"), True),
        (UserError("the disk is full"), False, (None, None), True),  # megarl run starts no such again
        (RuntimeError("a lost peer"), False, ("0", "0"), False),
    ],
)
def test_workers_are_told_that_the_run_is_over_where_nobody_starts_it_again(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    gave_up: bool,
    starts: tuple[str | None, str | None],
    over: bool,
) -> None:
    """Trainers that torchrun started again after a failed save waited for workers that had gone."""
    for name, value in zip(("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"), starts, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert is_over(error, gave_up) == over
