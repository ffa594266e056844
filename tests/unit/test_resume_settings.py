"""What a resumed run may change. Its checkpoint here is a folder with a name and a state: no more is looked at."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest

from megarl import refusals
from megarl.config import keep_config, load_config, walk
from megarl.data import PromptStream
from megarl.data.stream import content_digest
from megarl.errors import UserError
from megarl.refusals.resume import MAY_CHANGE

DECAY = ["train.lr_decay_style=linear", "train.steps=10"]  # four mini-batches a step: 40 optimizer steps


@pytest.fixture
def begun(run_yaml: Path) -> Path:
    """A run of run_yaml that has a checkpoint at step 4."""
    begin(run_yaml)
    return run_yaml


def begin(run_yaml: Path, *settings: str) -> None:
    config = load_config(run_yaml, list(settings))
    checkpoint = Path(config.run.dir) / "checkpoints" / "step_4"
    checkpoint.mkdir(parents=True, exist_ok=True)
    stream = PromptStream(1, config.run.seed, content=content_digest(config.data.prompts))
    (checkpoint / "megarl.json").write_text(json.dumps({"step": 4, "stream": stream.state_dict()}))
    keep_config(config, Path(config.run.dir), 0)


def test_fault_05_the_same_settings_and_those_that_may_change_are_taken(begun: Path) -> None:
    changed = (
        "train.steps=200 run.save_every=7 run.keep=3 run.loggers=[] parallel.tp=1 parallel.ep=1 launch.trainers=2 "
        "engine.micro_batch_tokens=4096 engine.distributed_optimizer=true rollout.engines=2 rollout.start_timeout_s=9 "
        "sync.timeout_s=9 eval.every=3 train.on_bad_batch=skip train.stop_on_dull_steps=0 train.mismatch_guard=0"
    )
    for settings in ([], changed.split()):
        refusals.check(load_config(begun, settings))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train.lr", "1e-06, now 1e-05"),
        ("train.adam_beta2", "0.999, now 0.9"),
        ("batch.group", "8, now 4"),
        ("run.seed", "0, now 1"),
        ("replay.mode", "None, now 'R2'"),
        ("objective.eps_high", "0.27, now 0.3"),
        ("train.lr_decay_style", "'constant', now 'linear'"),
        ("rollout.temperature", "1.0, now 0.5"),
        ("engine.dtype", "'auto', now 'bfloat16'"),
    ],
)
def test_fault_05_another_setting_is_refused_with_both_values_unless_forced(begun: Path, key: str, values: str) -> None:
    new = values.rpartition(" ")[2].strip("'")
    with pytest.raises(UserError) as error:
        refusals.check(load_config(begun, [f"{key}={new}"]))
    assert re.fullmatch(
        r"run.dir '.*/run' goes on from step 4, which was reached under other settings: "
        + re.escape(f"{key} {values}. Set them back, or give another run.dir, or run.resume=force to go on so"),
        str(error.value),
    )
    refusals.check(load_config(begun, [f"{key}={new}", "run.resume=force"]))


def test_fault_05_many_settings_are_named_up_to_a_number(begun: Path) -> None:
    settings = [
        "train.lr=1",
        "batch.group=2",
        "run.seed=5",
        "train.clip_grad=2",
        "train.adam_eps=1",
        "critic.gamma=0.5",
    ]
    with pytest.raises(UserError, match=r"batch.group 8, now 2; .* and 2 more\. Set"):
        refusals.check(load_config(begun, settings))


def test_fault_05_other_prompts_are_another_run_whatever_their_name(begun: Path) -> None:
    prompts = begun.parent / "prompts.jsonl"
    moved = prompts.rename(begun.parent / "moved.jsonl")
    refusals.check(load_config(begun, [f"data.prompts={moved}"]))
    prompts.write_text('{"prompt": "2", "answer": "2", "response": "2"}\n')
    with pytest.raises(UserError, match=r"data.prompts '.*/prompts.jsonl' holds other rows than before"):
        refusals.check(load_config(begun))
    refusals.check(load_config(begun, ["run.resume=force"]))


def test_fault_05_a_longer_run_does_not_stretch_the_decay_in_silence(run_yaml: Path) -> None:
    begin(run_yaml, *DECAY)
    longer = [*DECAY, "train.steps=20"]
    with pytest.raises(
        UserError, match=r"train.lr_decay_iters 40, now 80 with train.steps 20 \(set train.lr_decay_iters=40"
    ):
        refusals.check(load_config(run_yaml, longer))
    refusals.check(load_config(run_yaml, [*longer, "train.lr_decay_iters=40"]))
    refusals.check(load_config(run_yaml, [*longer, "run.resume=force"]))


def test_fault_05_a_new_run_and_a_finished_one_are_not_compared(run_yaml: Path) -> None:
    refusals.check(load_config(run_yaml, ["train.lr=1"]))
    begin(run_yaml)
    refusals.check(load_config(run_yaml, ["train.lr=1", "train.steps=4"]))


def test_fault_12_a_run_whose_checkpoints_are_all_cut_is_refused(begun: Path) -> None:
    state = begun.parent / "run" / "checkpoints" / "step_4" / "megarl.json"
    state.write_text('{"files": {"__0_0.distcp": [9, "0"]}}')
    with pytest.raises(UserError, match=r"step_4' is damaged \(__0_0.distcp is missing\), and there is no whole one"):
        refusals.check(load_config(begun))


def test_fault_05_every_start_keeps_its_settings(run_yaml: Path) -> None:
    run_dir = Path(load_config(run_yaml).run.dir)
    run_dir.mkdir()
    for resumed, lr in ((0, "1.0"), (4, "2.0"), (8, "3.0"), (6, "4.0")):
        keep_config(load_config(run_yaml, [f"train.lr={lr}"]), run_dir, resumed)
    kept = {path.name: load_config(path).train.lr for path in run_dir.glob("*.yaml")}
    assert kept == {"config.yaml": 4.0, "config.step_0.yaml": 1.0, "config.step_4.yaml": 2.0, "config.step_6.yaml": 4.0}


def test_a_full_disk_leaves_the_record_that_was_there(begun: Path) -> None:
    config = load_config(begun)
    record = Path(config.run.dir) / "config.yaml"
    before = record.read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError):
            keep_config(config, record.parent, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert record.read_text() == before


def test_a_record_that_is_empty_is_no_reason_to_refuse_and_a_broken_one_is_named(begun: Path) -> None:
    config = load_config(begun, ["train.lr=1e-5"])
    record = Path(config.run.dir) / "config.yaml"
    for text in ("", "\n"):
        record.write_text(text)
        refusals.check(config)
    record.write_bytes(b"sync:\ncritic:\nsft:\nscore: \xe9\n")
    with pytest.raises(UserError, match="config.yaml' cannot be read .*; move it away to go on unchecked"):
        refusals.check(config)
    record.write_bytes(b"train: \xe9\n")
    with pytest.raises(UserError, match="a config.yaml that is not a run's record"):
        refusals.check(config)


def test_what_may_change_are_keys_and_the_documentation_lists_them() -> None:
    names = [name for name, _, _ in walk()]
    page = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()
    for key, what in MAY_CHANGE.items():
        assert any(name == key or (key.endswith(".") and name.startswith(key)) for name in names), key
        assert f"| `{key}{'*' if key.endswith('.') else ''}` | {what} |" in page, key
