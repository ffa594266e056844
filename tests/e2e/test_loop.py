"""The loop as a whole, in two layouts: both engines agree after every
sync, a killed run goes on, a dead worker comes back.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megarl.observe.token_samples import read_token_samples
from megarl.observe.trace import read_trace
from megarl.observe.worst import read_worst
from tests.e2e.conftest import DP2, TP2_PP2_EP2, Bench, Command

STEPS, LAYERS, TOP_K, PROMPT, RESPONSES = 10, 4, 2, 6, 128
KEYS = """
    reward/mean reward/std reward/pass_at_g response/length_mean response/truncated_frac policy/entropy mismatch/kl_k1 mismatch/kl_k3
    mismatch/abs_logprob_diff_max mismatch/extreme_frac_2 mismatch/is_weight_mean mismatch/is_truncated_frac loss/value loss/weight_mean
    loss/weight_truncated_frac staleness/kl_k3 staleness/ratio_max staleness/clip_frac_pos staleness/clip_frac_neg
    routing/agree_rollout_old routing/agree_old_current routing/any_layer_differs_frac routing/layer_agreement
    routing/bytes_received_per_rank routing/bytes_ingested routing/missing_rows optim/grad_norm optim/lr time/rollout_s
    time/old_logprob_s time/update_s time/sync_s time/step_s throughput/tokens_per_s throughput/train_tokens_per_s version/weights
    version/rollout_lag_max
""".split()  # the table of the specification, "Metrics, every step"
EVAL_KEYS = ["eval/mean_at_k", "eval/pass_at_k"]


def configuration(bench: Bench, cold: Path, layout: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {
        **layout,
        "model": {"path": str(cold)},
        "data": {"prompts": str(bench.folder / "data" / "train.jsonl"), "reward": "digit_sum"},
        "eval": {"prompts": str(bench.folder / "data" / "valid.jsonl"), "every": 4, "samples": 2},
        "batch": {"prompts": 16, "group": 8},
        "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 9},
        "train": {"steps": STEPS, "lr": 5e-4, "lr_warmup_iters": 4, "lr_decay_style": "linear", "adam_beta2": 0.95},
        **sections,
    }


def r3(bench: Bench, cold: Path) -> dict[str, Any]:
    config = configuration(bench, cold, TP2_PP2_EP2, replay={"mode": "R3"}, run={"save_every": 2})
    config["batch"]["minibatches"] = 4
    config["rollout"]["temperature"] = 0.7
    return config


@pytest.fixture(scope="module")
def whole(bench: Bench, cold: Path) -> list[dict[str, Any]]:
    """R3 replayed under TP2 x PP2 x EP2, 4 mini-batches, temperature 0.7, from the first step to the last."""
    command = bench.finish("run", "whole", r3(bench, cold))
    started = [line.split()[0] for line in command.out.split("step  1/")[0].splitlines()]
    assert started == ["starting", "loading", "computing", "waiting", "rollout", "sending"], command.out
    return bench.rows("whole")


def assert_engines_agree(row: dict[str, Any], tokens_count: bool = True) -> None:
    """The trainer's log-probabilities against those of the server it has just filled.
    tokens_count: no route differs.
    """
    step = f"step {row['step']}"
    assert row["routing/agree_rollout_old"] >= 0.9999, f"{step}: {row['routing/layer_agreement']}"
    assert row["routing/worst_gap"] < 1e-5, f"{step}: a route differs where the scores are not nearly tied"
    assert row["sync/canary_max_diff"] <= 1e-4, step
    if tokens_count:
        assert row["mismatch/kl_k3"] <= 1e-9, step
        assert row["mismatch/abs_logprob_diff_max"] <= 1e-4, step
        assert abs(row["mismatch/is_weight_mean"] - 1) < 5e-5, step
        assert row["mismatch/extreme_frac_2"] == row["mismatch/is_truncated_frac"] == 0, step


def assert_every_key(rows: list[dict[str, Any]], evaluated: list[int]) -> None:
    for row in rows:
        keys = KEYS + (EVAL_KEYS if row["step"] in evaluated else [])
        assert [key for key in keys if row.get(key) is None] == [], f"step {row['step']}"
        assert len(row["routing/layer_agreement"]) == LAYERS
        assert row["version/rollout_lag_max"] == 0 and row["routing/missing_rows"] == 0


def route_rows(row: dict[str, Any]) -> float:
    """Rows of routes in a step: every token of prompt and response but a response's last."""
    return row["response/tokens"] + RESPONSES * (PROMPT - 1)


def test_engines_agree_after_every_sync_with_r3(whole: list[dict[str, Any]], bench: Bench) -> None:
    assert [row["step"] for row in whole] == list(range(1, STEPS + 1))
    assert_every_key(whole, evaluated=[4, 8, STEPS])
    for row in whole:
        assert_engines_agree(row)
        assert row["version/weights"] == 4 * row["step"]
        assert (
            row["staleness/ratio_max"] > 1.0 and row["optim/grad_norm"] > 0
        )  # the weights move between mini-batches and syncs
        assert row["routing/bytes_ingested"] == route_rows(row) * LAYERS * TOP_K
        # A rank gets half the rows (SP) of half the layers (PP), and no more than the padding of 4 packs beyond that.
        fair = row["routing/bytes_ingested"] / 4
        assert fair <= row["routing/bytes_received_per_rank"] <= fair + 4 * 4 * LAYERS / 2 * TOP_K
        worst = read_worst(bench.folder / "whole", row["step"], 1)  # of this step and later ones
        assert (
            worst
            and worst[0]["difference"] >= row["mismatch/abs_logprob_diff_max"] * (1 - 1e-6)
            and "=" in worst[0]["before"]
        )
    samples = read_token_samples(bench.folder / "whole", 4 * STEPS)
    assert [sample["step"] for sample in samples] == [step for step in range(1, STEPS + 1) for _ in range(4)]
    for sample in samples:  # what both engines said of every token of a response stands beside it
        assert len(sample["pieces"]) == len(sample["difference"]) == sample["tokens"] > 0
        assert max(map(abs, sample["difference"])) <= 1e-4 and sample["reward"] in (0.0, 1.0)
    page = (bench.folder / "whole" / "report.html").read_text()
    assert f"{STEPS} of {STEPS}" in page
    assert sorted(path.name for path in (bench.folder / "whole" / "checkpoints").iterdir()) == ["step_10", "step_8"]
    phases = Counter(event["name"] for event in read_trace(bench.folder / "whole"))
    assert (
        phases["rollout"] >= STEPS
        and phases["sync"] == STEPS + 1
        and phases["update"] == 4 * STEPS
        and phases["checkpoint"] == STEPS // 2
    ), phases


def test_fault_20_eval_of_a_checkpoint_is_what_the_run_said_of_it(
    whole: list[dict[str, Any]], bench: Bench, cold: Path
) -> None:
    """The last evaluation of the run, on the weights of its last checkpoint, with the same seeds."""
    config = r3(bench, cold)
    override = f"model.path={bench.folder}/whole/checkpoints/step_10"
    command = bench.finish("eval", "evaluated", {**config, "run": {}}, override, "--json")
    figures = json.loads(command.out.splitlines()[-1])
    assert {key: figures[key] for key in ("eval/k", *EVAL_KEYS)} == {
        key: whole[-1][key] for key in ("eval/k", *EVAL_KEYS)
    }
    assert figures["prompts"] == 16 and figures["eval/bad_samples"] == 0
    rows = [json.loads(line) for line in (bench.folder / "evaluated" / "eval.jsonl").read_text().splitlines()]
    assert len(rows) == 32 and sum(row["reward"] for row in rows) == pytest.approx(32 * figures["eval/mean_at_k"])
    for row in rows:
        assert row["reward"] == float(row["text"].strip()[-1:] == row["answer"]) and row["prompt"][-1] == "="
        assert row["routes"] is None and len(row["logprobs"]) == len(row["tokens"]) - row["prompt_len"]
    assert "converting" in command.out and sorted(p.name for p in (bench.folder / "evaluated").iterdir()) == [
        ".logs.eval.lock",
        "eval.jsonl",
        "logs.eval",
    ]


def test_a_finished_run_starts_nothing(whole: list[dict[str, Any]], bench: Bench, cold: Path) -> None:
    command = bench.finish("run", "whole", r3(bench, cold))
    assert command.out.startswith(
        f"run.dir '{bench.folder}/whole' is complete (step 10 of 10); raise train.steps to go on, or give another"
    )
    assert command.out.count("\n") == 1 and command.err == ""
    assert bench.rows("whole") == whole


def test_kill_9_of_everything_then_the_same_command(whole: list[dict[str, Any]], bench: Bench, cold: Path) -> None:
    """Each step is done once, bit for bit."""
    config, run_dir = r3(bench, cold), bench.folder / "killed"
    first = bench.start("run", "killed", config)
    saved = run_dir / "checkpoints" / "step_4"  # behind the steps
    first.wait_until(lambda: len(bench.rows("killed")) >= 5 and saved.is_dir(), "step 5 and the checkpoint of step 4")
    assert len([line for line in first.processes().values() if "megarl.launch.rank" in line]) >= 4
    first.kill_everything()
    checkpoints = run_dir / "checkpoints"
    assert (checkpoints / "step_4").is_dir() and not (checkpoints / "step_6").exists()
    half_written(checkpoints / "step_4", checkpoints / ".step_6.partial")
    half_written(checkpoints / "step_4", checkpoints / "step_8")
    shutil.copyfile(checkpoints / "step_4" / "megarl.json", checkpoints / "step_8" / "megarl.json")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/me')

    again = bench.start("run", "killed", config)
    again.wait_until(lambda: any("eval/k" in row for row in bench.rows("killed")[7:]), "the evaluation of step 8")
    assert "resuming after step 4\n" in again.out
    assert "checkpoints/step_8' is damaged (" in again.out and not (checkpoints / ".step_6.partial").exists()
    ctrl_c_ends_everything(again)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = bench.rows("killed")
    assert len(lines) == len(rows) and [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    last = rows[-1]["step"]  # Ctrl-C saved it, whether it was due or not
    assert (checkpoints / f"step_{last}" / "megarl.json").is_file()
    assert again.err.splitlines()[-1] == f"megarl: the same command goes on after step {last}"
    for row, same in zip(rows, whole):
        assert_same_step(row, same)


def half_written(source: Path, out: Path) -> None:
    """What a kill in the middle of a save could have left: everything
    but the mark of a whole checkpoint, one shard cut short.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    (out / "megarl.json").unlink()
    shard = next(path for path in out.iterdir() if path.suffix == ".distcp")
    shard.write_bytes(shard.read_bytes()[:100])


def assert_same_step(row: dict[str, Any], same: dict[str, Any]) -> None:
    """A step of the resumed run is, bit for bit, that of the run that
    was never stopped: weights, optimizer, schedule, prompts, seeds.
    """
    assert row.keys() == same.keys()
    assert {
        key: (row[key], same[key])
        for key in row
        if not key.startswith(("time/", "throughput/")) and row[key] != same[key]
    } == {}


def ctrl_c_ends_everything(command: Command) -> None:
    command.popen.send_signal(signal.SIGINT)
    assert command.wait() == 130
    assert command.processes() == {}
    assert "\nmegarl: SIGINT, ending all processes; what is not saved is saved first, at" in command.err


def test_no_replay_a_bad_line_skipped_and_the_only_worker_killed(bench: Bench, cold: Path) -> None:
    """Mode none under DP2 at temperature 1; the run waits for the server that is started again, gives it the weights,
    asks again for what it has lost, and ends with all its steps.
    """
    prompts = bench.folder / "data" / "spoilt.jsonl"
    lines = (bench.folder / "data" / "train.jsonl").read_text().splitlines()
    prompts.write_text("\n".join([*lines[:6], '{"prompt": "123=", "ans', *lines[6:]]) + "\n")
    config = configuration(bench, cold, DP2, replay={"mode": "none"})
    config["data"] |= {"prompts": str(prompts), "on_bad_line": "skip"}
    config["train"]["steps"] = 14
    command = bench.start("run", "none", config)
    command.wait_until(lambda: len(bench.rows("none")) >= 9, "step 9")  # the evaluation of step 8 is over
    server = next(pid for pid, line in command.processes().items() if "vllm.entrypoints" in line)
    os.kill(server, signal.SIGKILL)
    assert command.wait() == 0, command.err
    assert command.processes() == {}
    (lost,) = [line for line in command.out.splitlines() if "0 workers left" in line]
    assert lost.startswith("megarl: rollout worker 0 (pid ")
    assert "the vLLM server ended with status -9; its log is " in lost
    assert "megarl: rollout worker 1 (http://" in command.out and "megarl: error: " not in command.err
    assert f"{prompts}: skipped 1 bad lines, kept 512\n" in command.out

    rows = bench.rows("none")
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert sum(row["fleet/lost"] for row in rows) == 1 and {row["fleet/workers"] for row in rows} == {1}
    assert_every_key(rows, evaluated=[4, 8, 12, 14])
    clean = [row["routing/any_layer_differs_frac"] == 0 for row in rows]
    assert sum(clean) >= 6, (
        f"agreement {[row['routing/agree_rollout_old'] for row in rows]}: too few steps in which no route differs"
    )
    for row, no_route_differs in zip(rows, clean):
        assert_engines_agree(row, tokens_count=no_route_differs)
        assert row["version/weights"] == row["step"] and row["staleness/ratio_max"] == pytest.approx(1.0, abs=1e-6)
        assert row["routing/bytes_ingested"] == route_rows(row) * LAYERS * TOP_K
        assert (
            row["routing/bytes_ingested"] / 2
            <= row["routing/bytes_received_per_rank"]
            < row["routing/bytes_ingested"] * 0.6
        )


def test_a_malformed_line_stops_the_run(bench: Bench, cold: Path) -> None:
    prompts = bench.folder / "data" / "malformed.jsonl"
    prompts.write_text('{"prompt": "12345=", "answer": "5"}\n{"prompt": "12345=", "answer"\n')
    config = configuration(bench, cold, DP2)
    config["data"]["prompts"] = str(prompts)
    command = bench.start("run", "malformed", config)
    assert command.wait() == 2
    assert command.err.startswith(f"megarl: error: {prompts} line 2: not JSON (") and command.err.count("\n") == 1
    assert command.processes() == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=nowhere", "model.path 'nowhere' does not exist"),
        ("data.prompts=nowhere.jsonl", "data.prompts 'nowhere.jsonl' does not exist"),
        ("parallel.ep=3", "parallel etp 1 x ep 3 x pp 2 needs a multiple of 6 trainer ranks, there are 4"),
    ],
)
def test_what_is_refused_starts_nothing(bench: Bench, override: str, message: str) -> None:
    config = configuration(bench, bench.folder / "model", TP2_PP2_EP2)
    command = bench.start("run", "refused", config, override)
    assert command.wait() == 2
    assert command.err.startswith(f"megarl: error: {message}") and command.err.count("\n") == 1
    assert command.processes() == {} and not (bench.folder / "refused").exists()
