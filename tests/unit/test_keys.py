"""Fault 6: a key on the command line that the command would ignore is refused; one in the file may serve another."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.cli import main
from megarl.config import load_config
from megarl.errors import UserError
from megarl.refusals.keys import READS, all_keys, reads, refuse_ignored


def test_the_table_names_what_exists_and_every_key_has_a_reader() -> None:
    known = {*all_keys(), *(key.partition(".")[0] for key in all_keys())}
    for command, words in READS.items():
        assert {word.removeprefix("-") for word in words.split()} <= known, command
    assert [key for key in all_keys() if not any(reads(command, key) for command in READS)] == []


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("score", ["score.temperature=0.7", "train.lr=1"], "'train.lr=1': megarl score does not read train.lr, megarl"),
        ("score", ["rollout.temperature=0.7"], "megarl run and generate and compare does; leave it out (in CONFIG"),
        ("sft", ["batch.group=4"], "does not read batch.group"),
        ("sft", ["engine.distributed_optimizer=true", "train.lr=1"], ""),
        ("run", ["sft.batch=4"], "megarl run does not read sft.batch, megarl sft does"),
        ("run", ["score.temperature=1"], "does not read score.temperature"),
        ("rollout", ["train.lr=1", "launch.store=a:1"], ""),
        ("generate", ["batch.prompts=3"], "does not read batch.prompts"),
        ("generate", ["batch={group: 2, prompts: 3}"], "does not read batch.prompts"),
        ("generate", ["sync.quantize=none", "batch.group=3"], ""),
        ("compare", ["sync.quantize=int4", "objective=grpo", "objective.is_cap=3", "batch.prompts=3"], ""),
        ("compare", ["objective.eps_low=0.1"], "does not read objective.eps_low, megarl run and plan does"),
        ("compare", ["engine.distributed_optimizer=true"], "does not read engine.distributed_optimizer"),
        ("eval", ["eval.samples=2", "eval.prompts=p.jsonl", "rollout.engines=2", "data.reward=digit_sum"], ""),
        ("eval", ["rollout.temperature=0.5"], "does not read rollout.temperature"),
        ("run", ["critic.lr=1e-4"], "critic.lr is read only with objective.advantage gae, as of objective=ppo"),
        ("run", ["critic.lr=1e-4", "objective=ppo"], ""),
        ("run", ["eval.every=2"], "eval.every is read only with eval.prompts; set that too"),
        ("sft", ["train.min_lr=1e-6"], "train.min_lr is read only with a train.lr_decay_style other than constant"),
        ("run", ["batch.max_refills=3"], "batch.equal_groups=refill"),
        ("compare", ["sync.quantize_also=[router]"], "sync.quantize_also is read only with a sync.quantize"),
        ("plan", ["engine.recompute=full", "parallel.tp=2", "objective=ppo", "sync.transport=broadcast"], ""),
        ("plan", ["rollout.temperature=1"], "does not read rollout.temperature"),
    ],
)
def test_fault_06_an_override_that_is_ignored(command: str, overrides: list[str], message: str) -> None:
    if message:
        with pytest.raises(UserError) as error:
            refuse_ignored(command, load_config(None, overrides), overrides)
        assert message in str(error.value) and "\n" not in str(error.value)
    else:
        refuse_ignored(command, load_config(None, overrides), overrides)


def test_fault_06_by_the_command_line(run_yaml: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = run_yaml.parent / "rows.jsonl"
    rows.write_text('{"tokens": [3, 4], "prompt_len": 1}\n')
    given = ["--input", str(rows), "--output", "o.jsonl", "--dry-run"]
    assert main(["score", str(run_yaml), *given]) == 0  # its file holds keys of other commands
    assert main(["score", str(run_yaml), "batch.group=2", *given]) == 2
    assert capfd.readouterr().err.startswith("megarl: error: override 'batch.group=2': megarl score does not read")


def test_what_shares_a_gpu_in_a_run_does_not_in_other_commands(run_yaml: Path) -> None:
    from megarl.launch.processes import make_plan

    config = load_config(run_yaml, ["launch.colocate=true"])
    for command in ("run", "compare", "generate"):
        (worker,) = make_plan(command, "m", config, [str(run_yaml)]).rollouts
        assert ("launch.colocate=false" in worker.argv) == (command != "run")
