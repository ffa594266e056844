"""A server of two tensor-parallel ranks, of a model whose first layer
is dense: what it holds, resharded syncs into it, and its death.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megarl.launch.lifeline import descendants
from megarl.rollout import registry
from megarl.rollout.registry import RolloutDied, RolloutError
from megarl.weights.map.weight_map import WeightMap, load_hf_config
from megarl.weights.reshard.rollout_layout import VOCABULARY_MULTIPLE, RolloutLayout, rollout_rects
from tests.engine.support import Rollout, SlicePusher, judged, prompts, supervised
from tests.engine.test_supervision import ends

FUSED = (  # vLLM's modules that hold several tensors of the checkpoint
    (r"self_attn\.[qkv]_proj", "self_attn.qkv_proj"),
    (r"mlp\.(gate|up)_proj", "mlp.gate_up_proj"),
    (r"experts\.\d+\.(gate|up)_proj\.weight", "experts.routed_experts.w13_weight"),
    (r"experts\.\d+\.down_proj\.weight", "experts.routed_experts.w2_weight"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixed")
    return dense_first_layer(folder / "a", 5), dense_first_layer(folder / "b", 6)


@pytest.fixture(scope="module")
def server(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rollout]:
    with supervised(models[0], tmp_path_factory.mktemp("run"), tp=2) as rollout:
        yield rollout


def dense_first_layer(out: Path, seed: int) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tools.tiny_model import tiny_config

    config = Qwen3MoeConfig(**tiny_config(changes={"mlp_only_layers": [0]}).to_dict())
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(config).save_pretrained(out)
    assert json.loads((out / "config.json").read_text())["mlp_only_layers"] == [0]
    return out


def test_its_ranks_hold_what_the_plan_gives_them(server: Rollout, models: tuple[Path, Path]) -> None:
    """Element counts of vLLM's own parameters, rank by rank, against the slices; the vocabulary is padded."""
    rects = rollout_rects(WeightMap(load_hf_config(models[0])), RolloutLayout(1, 2))
    answer = server.call("parameter_sizes")
    assert len(answer) == 2
    for rank, held in enumerate(answer):
        planned: dict[str, int] = {}
        for name, holders in rects.items():
            for pattern, fused in FUSED:
                name = re.sub(pattern, fused, name)
            rect = holders[rank]
            planned[name] = planned.get(name, 0) + (rect.numel if rect else 0)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            planned[name] = VOCABULARY_MULTIPLE // 2 * 64  # 32 rows of 64: rank 0 has all that are not padding
        assert held == planned


def test_slices_arrive_and_a_dense_layer_has_no_routes(server: Rollout, models: tuple[Path, Path]) -> None:
    """vLLM reports all layers; we hand on those with experts. Two
    resharded syncs with other weights, from a single trainer rank.
    """
    pusher = SlicePusher(server.store, server.workers, models[0])
    for version, model in ((0, models[0]), (1, models[1]), (2, models[0])):
        if version:
            pusher.push(model, version)
            pusher.leader.check(str(model))
        assert server.client.weight_versions() == [version]
        for response in (r for group in server.client.generate(prompts(2, 8), 1, 1.0, 8, []) for r in group):
            logprobs, experts = judged(model, response.tokens.tolist())
            assert response.routes is not None and response.routes.shape == (15, 3, 2)
            np.testing.assert_array_equal(np.sort(response.routes, -1), experts)
            np.testing.assert_allclose(response.logprobs, logprobs[7:], atol=1e-5)


def test_slices_follow_the_plan_of_the_first_load(server: Rollout, models: tuple[Path, Path]) -> None:
    """Without vLLM's own loader, to which experts come as slices cut once more."""
    SlicePusher(server.store, server.workers, models[0]).push(models[0], 3)
    pusher = SlicePusher(server.store, server.workers, models[0])
    server.fault("no_walk")
    pusher.push(models[1], 4)
    server.fault("none")
    pusher.leader.check(str(models[1]))


def test_both_ways_into_one_worker(server: Rollout, models: tuple[Path, Path]) -> None:
    """As after trainers that begin again with another sync.transport. Of whole tensors a rank holds a part alone, whose
    bits do not add up to theirs; what it received as slices says nothing of that.
    """
    SlicePusher(server.store, server.workers, models[0]).push(models[0], 5)
    server.connect(models[1]).push(load_file(models[1] / "model.safetensors"), 6)
    SlicePusher(server.store, server.workers, models[0]).push(models[0], 7)
    assert server.client.weight_versions() == [7]


def test_a_worker_killed_while_it_loads_is_reported(server: Rollout, models: tuple[Path, Path]) -> None:
    """The store says so, with its last lines. The server is gone afterwards: this test is the last."""
    below = descendants(server.supervisors[0].pid)
    pusher = SlicePusher(server.store, server.workers, models[0])
    server.fault("die_loading")
    with pytest.raises(RolloutError, match=rf"^rollout server {server.workers[0].url}\S+: \S"):
        pusher.push(models[1], 3)
    with pytest.raises(
        RolloutDied, match=r"rollout worker 0 \(pid \d+ on \S+\): the vLLM server ended .*last lines of \S+0.log:\n"
    ):
        registry.check_workers(server.store, server.workers, wait_s=60)
    assert server.supervisors[0].wait(60) == 1
    assert ends(below, within_s=60)
    server.workers = []
