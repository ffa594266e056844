"""Refusals of folders: of the model, with its weights, its tokenizer and what vLLM makes of it; of a run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megarl import refusals
from megarl.config import dump_config, load_config
from megarl.errors import UserError
from megarl.observe.stall import StallWatch
from tests.conftest import write_weights
from tools.tiny_model import tiny_config


def test_weights_that_are_missing(run_yaml: Path) -> None:
    folder = run_yaml.parent / "model"
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        refusals.check(load_config(run_yaml), "score")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(UserError, match="lacks model-00001-of-00002.safetensors, which its index names"):
        refusals.check(load_config(run_yaml), "score")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="is not an index of safetensors"):
        refusals.check(load_config(run_yaml), "score")


def test_fault_14_a_file_that_was_cut_short(run_yaml: Path) -> None:
    file = run_yaml.parent / "model" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    for command in ("run", "rollout", "sft", "generate"):
        with pytest.raises(UserError, match=r"model.safetensors' is truncated: \d+ of \d+ bytes; copy the checkpoint"):
            refusals.check(load_config(run_yaml, ["launch.store=127.0.0.1:1"]), command)


def test_fault_09_vllm_would_read_what_the_trainer_leaves_aside(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_yaml.parent / "model"
    shutil.copyfile(folder / "model.safetensors", folder / "old.safetensors")
    vllm = r"reads model.safetensors, as transformers does, but vLLM reads old.safetensors"
    refusals.check(load_config(run_yaml), "score")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=f"{vllm} too; move what is stale out of the folder"):
        refusals.check(load_config(run_yaml), "generate")
    index = {"weight_map": {"model.norm.weight": "old.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusals.check(load_config(run_yaml), "sft")
    assert "reads model.safetensors, as transformers does, and leaves" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{vllm} by model.safetensors.index.json"):
        refusals.check(load_config(run_yaml), "run")


def test_fault_14_the_heads_that_vllm_has_on_a_cpu() -> None:
    """Where it is the CPU's build that is installed: its list is ours."""
    where = importlib.util.find_spec("vllm")
    if where is None or not where.origin:
        pytest.skip("vLLM is not installed")
    text = (Path(where.origin).parent / "v1/attention/backends/cpu_attn.py").read_text()
    found = re.search(r"def get_supported_head_sizes.*?return \[([\d, ]+)\]", text, re.DOTALL)
    assert found and tuple(map(int, found[1].split(","))) == refusals.server.CPU_HEADS


def test_fault_14_a_compiler_that_is_missing(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(run_yaml, ["rollout.enforce_eager=false"])
    monkeypatch.setattr(refusals.server.shutil, "which", lambda name: f"/bin/{name}")
    refusals.check(config)
    monkeypatch.setattr(refusals.server.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="rollout.enforce_eager false on a CPU needs a C"):
        refusals.check(config)
    refusals.check(config, "sft")


def test_a_tokenizer_that_is_missing(run_yaml: Path) -> None:
    (run_yaml.parent / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        refusals.check(load_config(run_yaml))
    refusals.check(load_config(run_yaml), "score")  # token ids in, numbers out


def test_config_json_that_is_broken(run_yaml: Path) -> None:
    (run_yaml.parent / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        refusals.check(load_config(run_yaml))


def test_a_deepseek_router_that_vllm_would_guess(run_yaml: Path) -> None:
    path = run_yaml.parent / "model" / "config.json"
    said = tiny_config("deepseek_v3").to_dict()
    config = load_config(run_yaml, ["parallel.ep=1"])
    path.write_text(json.dumps(said))
    write_weights(path.parent, said)
    refusals.check(config)
    path.write_text(json.dumps({key: value for key, value in said.items() if key != "scoring_func"}))
    with pytest.raises(
        UserError,
        match='vLLM would route otherwise than the trainer; add "scoring_func": "sigmoid" to its config.json$',
    ):
        refusals.check(config)
    refusals.check(config, "sft")


def test_fault_25_a_head_size_that_vllm_does_not_guess(run_yaml: Path) -> None:
    path = run_yaml.parent / "model" / "config.json"
    said = tiny_config("glm4_moe").to_dict()
    config = load_config(run_yaml, ["parallel.ep=1"])
    path.write_text(json.dumps(said))
    write_weights(path.parent, said)
    refusals.check(config)
    unsaid = {key: value for key, value in said.items() if key != "head_dim"}
    path.write_text(json.dumps(unsaid))
    write_weights(path.parent, unsaid)
    with pytest.raises(UserError, match='vLLM wants head_dim; add "head_dim": 16 to its config.json$'):
        refusals.check(config)
    refusals.check(config, "sft")


@pytest.mark.parametrize("out", ["there", ".", "link", "there/../there", "prompts.jsonl"])
def test_fault_03_a_cold_start_writes_no_folder_that_is_there(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(run_yaml.parent)
    Path("there").mkdir()
    Path("there/mine").write_text("1")
    Path("link").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"sft.out '{out}' already exists; remove it or give another folder"):
        refusals.check(load_config(run_yaml, [f"sft.out={out}"]), "sft")
    with pytest.raises(UserError, match="sft.out 'prompts.jsonl/x': '.*prompts.jsonl' is a file; give another folder"):
        refusals.check(load_config(run_yaml, ["sft.out=prompts.jsonl/x"]), "sft")
    Path(".new.partial").mkdir()
    refusals.check(load_config(run_yaml, ["sft.out=new"]), "sft")
    Path(".new.partial/mine").touch()
    with pytest.raises(UserError, match="sft.out 'new' is written under the name '.*.new.partial', which is there"):
        refusals.check(load_config(run_yaml, ["sft.out=new"]), "sft")
    Path("run/hf").mkdir(parents=True)
    with pytest.raises(UserError, match="sft.out is unset and '.*/run/hf' already exists"):
        refusals.check(load_config(run_yaml), "sft")


def test_fault_03_a_run_touches_nothing_in_its_folder_that_is_not_a_runs(run_yaml: Path) -> None:
    run, config = run_yaml.parent / "run", load_config(run_yaml)
    for name, said in [
        ("logs/mine.txt", "a folder logs that is not a run's"),
        ("logs.previous/mine.txt", "a folder logs.previous that is not a run's"),
        ("checkpoints/step_3/mine.pt", "checkpoints/step_3 is no checkpoint of a run, it has no megarl.json"),
        ("config.yaml", "a config.yaml that is not a run's record"),
    ]:
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("train: {lr: 1}")
        with pytest.raises(UserError, match=said):
            refusals.check(config, "train")
        shutil.rmtree(run)
    for name in ("logs/torchrun.log", "logs.previous/rollout_0.log", "checkpoints/step_3/megarl.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("{}")
    (run / "config.yaml").write_text(dump_config(config))
    refusals.check(config, "run")
    (run / "logs/torchrun.log").unlink()
    StallWatch(run / "logs", 0, 1, 60).close()  # all that a rank under an outer torchrun leaves there
    refusals.check(config, "train")


@pytest.mark.parametrize("name", ["checkpoints", "rollouts", "tensorboard", "config.yaml", "metrics.jsonl"])
def test_a_name_of_the_run_that_is_taken_by_another_kind(run_yaml: Path, name: str) -> None:
    """A file in the place of checkpoints/ was found out at the first save, after all that was learnt until then."""
    config = load_config(run_yaml)
    there = Path(config.run.dir) / name
    there.mkdir(parents=True)
    if not there.suffix:
        there.rmdir()
        there.touch()
    with pytest.raises(UserError, match=f"holds a (file|folder) {name}, where a run has a (file|folder); move it away"):
        refusals.check(config, "run")


@pytest.mark.parametrize("target", ["nowhere", "run"])
def test_a_run_folder_that_is_a_link_to_nothing_or_to_itself(run_yaml: Path, target: str) -> None:
    config = load_config(run_yaml)
    Path(config.run.dir).symlink_to(target)
    for inside in ("", "/x"):
        config.run.dir = config.run.dir + inside
        with pytest.raises(UserError, match="run' is a link that leads nowhere; mend it or give another folder"):
            refusals.check(config, "score")


def test_an_output_that_could_not_be_begun_after_all_work(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_yaml.parent
    (folder / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="^sft.out .*/loop' is no folder that can be written to; give another folder"):
        refusals.check(load_config(run_yaml, [f"sft.out={folder}/loop/x"]), "sft")
    sealed = folder / "sealed"
    sealed.mkdir()
    made = tempfile.TemporaryFile  # root may write everywhere

    def refused(dir: Path) -> Any:
        if dir == sealed:
            raise PermissionError
        return made(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(UserError, match="^sft.out .*/sealed' is no folder that can be written to; give another folder"):
        refusals.check(load_config(run_yaml, [f"sft.out={sealed}/x"]), "sft")
