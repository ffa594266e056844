"""The typed tree: what is refused, what is suggested, and that what is written is read back."""

from __future__ import annotations

import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from megarl.config import Config, dump_config, load_config, walk
from megarl.config.sections import LONGEST_S
from megarl.engine.parallel import group_timeout
from megarl.errors import UserError
from megarl.hints import MEANT
from megarl.objective.presets import ObjectiveConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "unknown config key 'train.lrr'; did you mean 'train.lr'?"),
        ("launch.trainer=2", "unknown config key 'launch.trainer'; did you mean 'launch.trainers'?"),
        ("trian.lr=1", "unknown config key 'trian'; did you mean 'train'?"),
        ("zzzzqqqq=1", "unknown config key 'zzzzqqqq'; docs/config.md lists the keys"),
        ("train.learning_rate=1", "unknown config key 'train.learning_rate'; did you mean 'train.lr'?"),
        ("batch_size=1", "unknown config key 'batch_size'; did you mean 'batch.prompts'?"),
        ("rollout.max_tokens=1", "did you mean 'rollout.max_new_tokens'?"),
        ("parallel.tp_size=2", "did you mean 'parallel.tp'?"),
        ("train.group=2", "did you mean 'batch.group'?"),
        ("optimizer.lr=1", "unknown config key 'optimizer'; did you mean 'train.lr' or 'critic.lr'?"),
        ("sync.quant=int4", "did you mean 'sync.quantize'?"),
        ("score.zzz=1", "unknown config key 'score.zzz'; section 'score' has temperature"),
        ("train.lr=fast", "config key 'train.lr' = 'fast': input should be a valid number"),
        ("run.seed=-1", "config key 'run.seed' = -1: input should be greater than or equal to 0"),
        ("batch.group=20000", "config key 'batch.group' = 20000: input should be less than or equal to 16384"),
        ("parallel.tp=0", "config key 'parallel.tp' = 0: input should be greater than or equal to 1"),
        ("batch.group=2.5", "config key 'batch.group' = 2.5: input should be a valid integer"),
        ("replay.mode=R4", "config key 'replay.mode' = 'R4': input should be 'none', 'R2' or 'R3'"),
        ("train.lr", "override 'train.lr' is not key=value"),
        ("train.lr.x=1", "override 'train.lr.x=1': 'lr' is a value, not a section"),
        ("train.lr=.inf", "config key 'train.lr' = inf: input should be a finite number"),
        ("objective.is_cap=.nan", "config key 'objective.is_cap' = nan: input should be a finite number"),
        ("score.temperature=1e-40", "config key 'score.temperature' = 1e-40: input should be greater than or"),
        ("model=runs/tiny", "'model' = 'runs/tiny': this is a section; give its keys, e.g. model: {path: ...}"),
        ("objective=[minirl]", "objective ['minirl'] is a list; give a preset's name"),
        (f"train={[7] * 999}", "7, ...: this is a section"),
        ("train.steps=true", "config key 'train.steps' = True: input should be a valid integer"),
        ("rollout.max_lag=yes", "config key 'rollout.max_lag' = True: input should be a valid integer"),
        ("train.lr=true", "config key 'train.lr' = True: input should be a valid number"),
        ("objective.is_cap=true", "config key 'objective.is_cap' = True: input should be a valid number"),
        ("rollout.stop_token_ids=[1, true]", "'rollout.stop_token_ids.1' = True: input should be a valid integer"),
        ("sync.staged=1", "config key 'sync.staged' = 1: input should be a valid boolean"),
        (
            "data.shuffle='no'",
            "config key 'data.shuffle' = 'no': input should be a valid boolean; leave out the quotes",
        ),
        ("train.steps='3'", "config key 'train.steps' = '3': input should be a valid integer; leave out the quotes"),
        ("objective=minrl", "'minirl'"),
        ("objective.eps_hi=1", "eps_high"),
        ("objective.is_cap=-1", "is_cap"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_fix(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {lr: 1.0e-3}\n")
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1\n", "holds a list"),
        ("train: 3\n", "'train' = 3"),
        ("a: " + "[" * 5000, "is not YAML: maximum recursion depth exceeded"),
        ("train.lr: 3\n", "'train.lr': in a file a dot makes no section; write train: {lr: ...}"),
        ("foo.bar: 3\n", "unknown config key 'foo.bar'"),
        ("run: {dir: 12}\n", "'run.dir' = 12: .*; put it in quotes"),
    ],
)
def test_a_file_that_is_no_tree_of_sections(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {lr: 1}\nrun: {}\ntrain:\n  steps: 3\n", "key 'train' is given on line 1 and again on line 3"),
        ('train:\n  lr: 1\n  steps: 2\n  "lr": 3\n', "key 'lr' is given on line 2 and again on line 4"),
        ("sft: [{a: 1, a: 2}]\n", "key 'a' is given on line 1 and again on line 1"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_lines(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^config file '{path}': {said}; leave one out$"):
        load_config(path)


def test_a_key_given_twice_in_an_override() -> None:
    with pytest.raises(UserError, match="key 'group' is given twice; leave one out$"):
        load_config(None, ["batch={group: 2, group: 3}"])
    assert load_config(None, ["run.dir={a: 1, a: 2}"]).run.dir == "{a: 1, a: 2}"


def test_a_merge_may_stand_twice(tmp_path: Path) -> None:
    """YAML's << is no key of the section that it fills."""
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  <<: {lr: 1.0}\n  <<: {steps: 7}\n", encoding="utf-8")
    assert load_config(path).train.steps == 7


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("eval: {prompts: &p a.jsonl}\ndata: {<<: {prompts: b}, prompts: *p}\n")
    assert load_config(path).data.prompts == "a.jsonl"


def test_a_file_in_another_encoding_and_a_date_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes("run: {dir: é}".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not in UTF-8 \(byte 11\)"):
        load_config(path)
    path.write_text("run: {dir: 2026-13-01}")
    with pytest.raises(UserError, match="is not YAML: month must be in 1..12"):
        load_config(path)
    assert load_config(None, ["run.dir=2026-13-01"]).run.dir == "2026-13-01"


@pytest.mark.parametrize(
    "key",
    "batch.prompts sft.batch rollout.max_prompt_tokens rollout.max_new_tokens rollout.max_num_seqs rollout.max_lag "
    "engine.micro_batch_tokens".split(),
)
def test_a_count_of_what_is_held_at_once_has_a_limit(key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' = 1000000000000: input should be less than or equal to "):
        load_config(None, [f"{key}=1000000000000"])


LIMITS = [name for name, _, _ in walk() if name.endswith("_s")]


@pytest.mark.parametrize("key", LIMITS)
def test_a_time_limit_is_one_that_timers_can_count(key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' = 10000000000.0: input should be less than or equal to 604800"):
        load_config(None, [f"{key}=1e10"])


def test_no_wait_is_longer_than_the_kernel_counts() -> None:
    """Milliseconds in a C int: selectors, and torch's waits of a group."""
    longest = group_timeout(load_config(None, [f"{key}={LONGEST_S}" for key in LIMITS]))
    assert longest.total_seconds() * 1000 < 2**31


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of run.dir=~/x, and YAML that of a file, as it stands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ["model.path", "data.prompts", "eval.prompts", "sft.data", "sft.out", "run.dir", "launch.rollout_python"]
    config = load_config(None, [f"{key}=~/x" for key in keys])
    assert {attrgetter(key)(config) for key in keys} == {f"{tmp_path}/x"}


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", ".1e-4", "+10e-6", "1.0e-5", "0.00001"])
def test_a_number_with_an_exponent(text: str) -> None:
    assert load_config(None, [f"train.lr={text}", f"objective.eps_low={text}"]).train.lr == 1e-5


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match="'nowhere.yaml' does not exist"):
        load_config("nowhere.yaml")


def test_overrides_are_yaml_and_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {lr: 1.0e-3}\nobjective: grpo\neval:\n")
    config = load_config(path, ["train.lr=1e-5", "run.loggers=[]", "objective.eps_low=0.1", "eval.prompts=null"])
    assert (config.train.lr, config.run.loggers, config.eval.prompts) == (1e-5, [], None)
    assert (config.objective.preset, config.objective.eps_low, config.objective.advantage) == ("grpo", 0.1, "mean_std")


@pytest.mark.parametrize(("minibatches", "mode"), [(1, "none"), (2, "R2"), (3, "R3"), (8, "R3")])
def test_default_replay_follows_the_degree_of_off_policiness(minibatches: int, mode: str) -> None:
    assert load_config(None, [f"batch.minibatches={minibatches}"]).replay_mode == mode


@pytest.mark.parametrize(
    ("rollout", "engine", "on_gpu", "dtype"),
    [
        ("float32", "bfloat16", True, "float32"),
        ("auto", "bfloat16", False, "bfloat16"),
        ("auto", "auto", True, "bfloat16"),
        ("auto", "auto", False, "float32"),
    ],
)
def test_rollout_dtype_auto_is_the_training_precision(rollout: str, engine: str, on_gpu: bool, dtype: str) -> None:
    config = load_config(None, [f"rollout.dtype={rollout}", f"engine.dtype={engine}"])
    assert config.rollout_dtype(on_gpu=on_gpu) == dtype


def test_off_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("sync: {digests: off}")
    for config in (load_config(tmp_path / "run.yaml"), load_config(None, ["sync.digests=off"])):
        assert config.sync.digests == "off"


@pytest.mark.parametrize("text", ["2026-11-28", "12", "[fe80::1]:29600", "a: b", "on"])
def test_fault_23_a_text_that_yaml_would_read_otherwise(text: str) -> None:
    assert load_config(None, [f"run.dir={text}", f"launch.store={text}"]).run.dir == text
    assert load_config(None, [f"run.dir='{text}'"]).run.dir == text
    assert load_config(None, ["eval.prompts=null"]).eval.prompts is None


def test_fault_23_every_hint_names_a_key() -> None:
    keys = {name for name, _, _ in walk()} | {f"objective.{name}" for name in ObjectiveConfig.model_fields}
    assert set(MEANT.values()) <= keys


def test_what_is_dumped_loads_as_the_same_tree(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "objective={preset: dapo, eps_low: 0.1}",
            "train.lr=3e-6",
            "replay.mode=none",
            "sync.canary_tolerance=1e-3",
            "run.dir=1e5",
        ],
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_every_key_has_a_default_and_is_documented() -> None:
    Config()
    root = Path(__file__).parents[2]
    reference = (root / "docs" / "config.md").read_text()
    missing = [key for key, _, _ in walk() if key != "objective" and f"`{key}`" not in reference]
    assert not missing
    check = subprocess.run(
        [sys.executable, root / "tools" / "config_docs.py", "--check"], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout
