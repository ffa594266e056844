"""A run over three hosts by the README's own commands: two train, one rolls out, which shares no folder with them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megarl.door import RUN_SECRET
from megarl.observe.metrics import read_metrics
from tests.e2e.conftest import Bench
from tests.hosts import ROOT, Host, Started, network

STEPS, SAVE_EVERY, CUT_AT = 24, 2, 4
START_S, STEP_S, SILENT_S = 480.0, 180.0, 90.0  # the first two only end what hangs


def readme(program: str, **words: str) -> list[str]:
    """The README's command of many nodes that starts with `program`, its words in capitals replaced."""
    text = re.sub(r" \\\n +", " ", (ROOT / "README.md").read_text())
    line = re.search(rf"^    ({program} .*launch\.store=.*?)( +#.*)?$", text, re.MULTILINE)
    assert line is not None
    command = line[1].replace("--nproc-per-node 8", "--nproc-per-node 1")
    for name, word in words.items():
        command = re.sub(rf"\b{name}\b", word, command)
    return command.split()


def steps(folder: Path) -> list[int]:
    try:
        return [row["step"] for row in read_metrics(folder)]
    except FileNotFoundError:
        return []


def started(host: Host, name: str, command: list[str], **env: str) -> Started:
    return host.start(name, *command, **{RUN_SECRET: "of this test", "OMP_NUM_THREADS": "1"}, **env)


def another_clock(folder: Path) -> str:
    """A PYTHONPATH under which it was a day before."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() - 86400\n")
    return f"{folder}:{ROOT}"


def test_a_run_over_three_hosts_whose_network_fails_and_comes_back(bench: Bench, tmp_path: Path) -> None:
    run_dir, config = tmp_path / "run", tmp_path / "run.yaml"
    sections = {
        "model": {"path": str(bench.folder / "model")},
        "data": {"prompts": str(bench.folder / "data" / "train.jsonl"), "reward": "digit_sum"},
        "batch": {"prompts": 8, "group": 4},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 9, "start_timeout_s": 400},
        "train": {"steps": STEPS, "lr": 5e-4, "stop_on_dull_steps": 0},
        "run": {"dir": str(run_dir), "save_every": SAVE_EVERY},
    }
    config.write_text(yaml.safe_dump(sections))
    with network(tmp_path, "node0", "node1", "gen0") as net:
        node0, node1, gen0 = net.hosts
        own = gen0.keep_apart(run_dir)
        words = {"HOST": "node0", "CONFIG": str(config), "N": "2"}
        clock = another_clock(tmp_path / "clock")  # of gen0; no host's time means anything to another
        server = started(gen0, "rollout", readme("megarl rollout", **words), PYTHONPATH=clock)

        def train(name: str) -> list[Started]:
            program, hosts = "python -m torch.distributed.run", enumerate((node0, node1))
            return [started(host, name, readme(program, I=str(i), **words)) for i, host in hosts]

        def until(condition: Callable[[], bool], within_s: float) -> None:
            trainers[0].until(condition, within_s)

        trainers = train("train")
        until(lambda: len(steps(run_dir)) >= 1, START_S)
        net.cut(gen0)  # for a moment: nothing is lost, and nobody says a word
        before = len(steps(run_dir))
        time.sleep(3)
        net.join(gen0)
        until(lambda: len(steps(run_dir)) >= max(CUT_AT, before + 2), STEP_S)
        net.cut(node1)
        for trainer, there in zip(trainers, (node1, node0), strict=True):
            assert trainer.wait(SILENT_S) != 0
            errors = [line for line in trainer.text.splitlines() if line.startswith("megarl: error: ")]
            (line,) = errors
            assert f"host {there.name} ({there.address})" in line and "has not answered" in line, line
        reached = steps(run_dir)[-1]
        assert reached < STEPS and server.popen.poll() is None
        net.join(node1)

        trainers = train("again")
        until(lambda: len(steps(run_dir)) > reached, START_S)
        for process in (*trainers, server):
            assert process.wait(START_S) == 0, process.text
        assert steps(run_dir) == list(range(1, STEPS + 1))
        assert "does not see" in trainers[0].text and ".weight_check" in trainers[0].text  # gen0 has its own run.dir
        assert {path.name for path in (run_dir / "logs").iterdir()} >= {"trainer_0.log", "trainer_1.log"}
        assert [path.name for path in gen0.tmp.iterdir() if not path.name.startswith("torchinductor")] == []
        assert [path.name for path in own.iterdir()] == ["logs.rollout"]


@pytest.mark.parametrize("program", ["python -m torch.distributed.run", "megarl rollout"])
def test_the_readme_has_the_commands_of_many_nodes(program: str) -> None:
    assert "launch.store=first:29600" in readme(program, HOST="first")
