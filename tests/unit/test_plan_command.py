"""`megarl plan`: figures from config.json alone, as a table and as JSON; layouts are refused as for a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megarl.cli import main
from megarl.config import load_config
from megarl.estimate.cluster import Hosts, plan_run
from megarl.simulate import command
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap, load_hf_config
from megarl.weights.reshard.manifest import slice_plan
from megarl.weights.reshard.rollout_layout import RolloutLayout


def test_figures_of_a_layout(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_yaml.parent / "model" / "model.safetensors").unlink()  # weights are not looked at
    options = ["plan", str(run_yaml), "engine.dtype=float32", "rollout.tp=2", "--world", "8"]
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sync, stages = found["sync"], found["train"]["stages"]
    assert [stage["layers"] for stage in stages] == [2, 2]
    assert all(
        stage["gradients"] == stage["parameters"] and stage["optimizer"] == 2 * stage["parameters"] for stage in stages
    )
    assert (
        sync["bytes_over_held"] == 1.0
        and sync["sender_max"] >= sync["sender_bound"]
        and sync["seconds"] >= sync["seconds_bound"]
    )
    assert main([*options, "engine.distributed_optimizer=true", "--json"]) == 0
    sharded = json.loads(capsys.readouterr().out)["train"]["stages"]
    assert all(a["optimizer"] < b["optimizer"] for a, b in zip(sharded, stages))
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "weight sync" in text and "\nfits: " in text
    most = max(stage["total"] for stage in stages)
    assert main([*options, "--gpu-gib", str(most / 0.91 / 2**30)]) == 1  # a tenth stays free
    assert "\ndoes not fit: " in capsys.readouterr().out
    assert main([*options, "--gpu-gib", str(most / 0.89 / 2**30)]) == 0


def test_a_critic_is_counted_on_the_card_and_a_reference_in_host_memory(run_yaml: Path) -> None:
    def stage(*overrides: str) -> dict[str, int]:
        config = load_config(run_yaml, ["engine.dtype=bfloat16", *overrides])
        return plan_run(config, 4, 1, Hosts(8, 50.0))["train"]["stages"][0]  # whose critic is the policy's trunk

    policy, ppo, kl = stage(), stage("objective=ppo"), stage("objective.kl_coef=0.1")
    states = ("parameters", "gradients", "optimizer")
    assert [ppo[part] for part in states] == [2 * policy[part] for part in states]
    assert ppo["total"] == policy["total"] + sum(policy[part] for part in states)
    assert (kl["total"], kl["host"]) == (policy["total"], policy["host"] + policy["parameters"])


def test_an_impossible_layout_is_refused(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run_yaml), "--world", "6"]) == 2
    assert "trainer ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--world", "1000000000"], "--world 1000000000 is not a number of ranks; give 1 to 1000000"),
        (["rollout.engines=1000000000"], "rollout.engines x rollout.tp 1000000000 is not a number of ranks"),
        (["--out", "x.html"], "--out x.html is read only with --trace"),
        (["--rank", "0", "--search"], "--rank 0 is read only with --trace"),
        (["--trace", "--search"], "--trace and --search are two plans"),
        (["--trace", "--out", "{yaml}"], "run.yaml' is there and is no page or picture; give another file"),
        (["--trace", "--out", "{folder}"], "is a folder; give a file"),
    ],
)
def test_an_option_in_vain_or_out_of_reach_is_refused_at_once(
    argv: list[str], said: str, run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "simulated_ranks", lambda _: pytest.fail("a simulation was started"))
    text = run_yaml.read_text()
    assert main(["plan", str(run_yaml), *(word.format(yaml=run_yaml, folder=run_yaml.parent) for word in argv)]) == 2
    assert said in capsys.readouterr().err and run_yaml.read_text() == text


def test_the_sync_that_is_reported_is_the_one_that_runs(run_yaml: Path) -> None:
    file = run_yaml.parent / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 2**18}))  # 32 MiB each for both ends
    config = load_config(run_yaml, ["engine.dtype=bfloat16"])
    found = plan_run(config, 8, 1, Hosts(8, 50.0))["sync"]
    layout = Layout(**config.parallel.model_dump(), world=8)
    weight_map = WeightMap(load_hf_config(config.model.path))
    real = slice_plan(weight_map, layout, RolloutLayout(config.rollout.engines, 1), torch.bfloat16)
    assert real.buckets > 1
    assert (found["buckets"], found["messages"]) == (real.buckets, real.load.messages)
