"""Mistakes about rows, rewards and evaluation: each is one line that names the thing, its value and
the fix, before any process of a run starts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megarl import refusals
from megarl.cli import main
from megarl.config import load_config
from megarl.errors import UserError
from megarl.launch import local
from tools.tiny_model import make_tokenizer

REWARDS = """
import time
def odd(text, gold): return 1
def verl(data_source, solution_str, ground_truth, extra_info=None): return {"score": 1.0}
def row_of(response, level): return level
def acc(response, answer): return {"acc": 1.0}
def hangs(response): time.sleep(60)
def dies(response): import os; os._exit(4)
def fine(response, answer): return response == answer
"""
GOOD = {"prompt": "1+1=", "answer": "2"}
USER = [{"role": "user", "content": "1+1="}]

# rows, overrides, what the line must say
ROWS: list[tuple[list[Any], list[str], list[str]]] = [
    ([GOOD, {"prompt": "1" * 40, "answer": "2"}], [], ["line 2: 40 tokens", "rollout.max_prompt_tokens 24", "raise"]),
    ([{"messages": [{"role": "user", "content": "1" * 40}], "answer": "2"}], [], ["line 1: ", "no chat template"]),
    ([{"prompt": USER, "reward_model": {"ground_truth": "5"}}], [], ["messages under 'prompt'", "chat_template.jinja"]),
    ([GOOD, {"question": "1+1="}], [], ["line 2: has no answer, its keys are 'question'", "data.columns"]),
    ([GOOD], ["data.columns={answer: gold}"], ["data.columns names 'gold' for the answer, which no row of "]),
    (["", " "], [], ["holds no usable row"]),
    (["{", "}"], ["data.on_bad_line=skip"], ["holds no usable row (2 bad lines)"]),
    ([GOOD, '{"prompt": "1\\ud83d", "answer": "2"}'], [], ["line 2: key 'prompt' holds '\\ud83d'"]),
    ([GOOD, {"prompt": "1+1=", "answer": "$$"}], ["data.reward=math_verify"], ["line 2: answer '$$'", "math_verify"]),
]
REWARD: list[tuple[str, list[str], list[str]]] = [
    ("odd", [], ["has the parameter 'text'", "one of response, ", "(prompt, answer); rename it", "first row of "]),
    ("row_of", [], ["has the parameter 'level'", "key of the row (prompt, answer)"]),
    ("acc", [], ["gave a dict with the keys 'acc'; it needs 'score'", "its answer as the response"]),
    ("hangs", ["data.reward_timeout_s=1"], ["took longer than data.reward_timeout_s 1"]),
    ("dies", [], ["ended its process (status 4)"]),
    ("gone", [], ["has no function 'gone'"]),
]


@pytest.fixture
def config_of(run_yaml: Path, monkeypatch: pytest.MonkeyPatch):
    folder = run_yaml.parent
    make_tokenizer().backend_tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "mistaken_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(folder)
    root = str(Path(__file__).resolve().parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))

    def made(*overrides: str, rows: list[Any] | None = None) -> Any:
        if rows is not None:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (folder / "prompts.jsonl").write_text("".join(line + "\n" for line in lines))
        return load_config(run_yaml, ["rollout.max_prompt_tokens=24", *overrides])

    return made


def line_of(config: Any, command: str = "run") -> str:
    with pytest.raises(UserError) as caught:
        refusals.check(config, command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("rows", "overrides", "says"), ROWS, ids=range(len(ROWS)))
def test_rows(config_of, rows: list[Any], overrides: list[str], says: list[str]) -> None:
    line = line_of(config_of(*overrides, rows=rows))
    assert [words for words in says if words not in line] == [], line


@pytest.mark.parametrize(("name", "overrides", "says"), REWARD, ids=[name for name, _, _ in REWARD])
def test_fault_08_a_reward_is_tried_before_the_servers_start(
    config_of, name: str, overrides: list[str], says: list[str]
) -> None:
    config = config_of(f"data.reward=mistaken_rewards.{name}", *overrides, rows=["{", GOOD])
    config.data.on_bad_line = "skip"
    line = line_of(config)
    assert line.startswith(f"data.reward 'mistaken_rewards.{name}'")
    assert [words for words in says if words not in line] == [], line


@pytest.mark.parametrize("name", ["fine", "verl"])
def test_fault_08_a_reward_that_works_is_not_refused(config_of, name: str) -> None:
    refusals.check(config_of(f"data.reward=mistaken_rewards.{name}", rows=[GOOD]))


def test_demonstrations_that_end_with_the_assistant_are_not_refused(config_of) -> None:
    config = config_of()
    messages = [*USER, {"role": "assistant", "content": "2" * 60}]
    Path(config.sft.data).write_text(json.dumps({"messages": messages}) + "\n")
    assert "no chat template" in line_of(config, "sft")
    (Path(config.model.path) / "chat_template.jinja").write_text("{{ messages }}")
    refusals.check(config, "sft")
    config.rollout.max_new_tokens = 16
    assert "64 tokens are more than rollout.max_prompt_tokens + rollout.max_new_tokens = 40" in line_of(config, "sft")


COMMANDS: list[tuple[list[str], dict[str, Any], list[str]]] = [
    (["run", "train.learning_rate=1e-5"], {}, ["'train.learning_rate'; did you mean 'train.lr'?"]),
    (["run", "model.path=Qwen/Qwen3-30B-A3B"], {}, ["model.path 'Qwen/Qwen3-30B-A3B'", "nothing is fetched"]),
    (["run", "rollout.kv_cache_gib=0.00001"], {}, ["rollout.kv_cache_gib 1e-05", "raise"]),
    (["run"], {"head_dim": 16}, ["head_dim 16", "on a CPU"]),
    (["run"], {"vocab_size": 16}, ["vocab_size", "16"]),
    (["score"], {"moe_intermediate_size": 16}, ["moe_intermediate_size"]),
    (["run", "run.dir=/proc/x/y"], {}, ["/proc/x"]),
    (["run", "run.loggers=[collections.OrderedDict]"], {}, ["run.loggers 'collections.OrderedDict'"]),
    (["run", "eval.temperature=0", "eval.samples=2"], {}, ["eval.samples 2 with eval.temperature 0", "set"]),
    (["sft", "sft.out={folder}"], {}, ["sft.out", "already exists"]),
    (["generate", "sync.quantize=int4"], {}, ["sync.quantize int4", "none"]),
    (["eval", "train.lr=1"], {}, ["megarl eval does not read train.lr"]),
    (["run", "train.lr=1e-5", "train.min_lr=1", "train.lr_decay_style=linear"], {}, ["train.min_lr 1 is above"]),
]


@pytest.mark.parametrize(("argv", "hf", "says"), COMMANDS, ids=[" ".join(argv) or "run" for argv, _, _ in COMMANDS])
def test_a_mistake_by_the_command_line_starts_nothing(
    run_yaml: Path,
    hf_config: dict[str, Any],
    argv: list[str],
    hf: dict[str, Any],
    says: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = run_yaml.parent
    monkeypatch.setattr(local, "supervise", lambda *_, **__: pytest.fail("processes were started"))
    (folder / "model" / "config.json").write_text(json.dumps(hf_config | hf))
    (folder / "rows.jsonl").write_text('{"prompt": "1", "answer": "1", "tokens": [3, 4], "prompt_len": 1}\n')
    command, *overrides = [word.format(folder=folder) for word in argv]
    files = ["--input", f"{folder}/rows.jsonl", "--output", f"{folder}/out.jsonl"]
    assert main([command, str(run_yaml), *overrides, *(files if command in ("score", "generate") else [])]) == 2
    err = capfd.readouterr().err
    assert err.startswith("megarl: error: ") and err.count("\n") == 1, err
    assert [words for words in says if words not in err] == [], err
    assert not (folder / "run").exists()
