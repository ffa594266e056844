"""The engine on a simulated GPU, in layouts of every kind: no tensor on the wrong device, and peak memory as it is
planned.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from megarl.config import load_config
from megarl.estimate.memory import Training, stage_memory
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap

HIDDEN, EXPERTS, TOPK, WIDTH, TOKENS, VOCABULARY = 1024, 16, 4, 512, 2048, 32_000
KEYS = [
    "engine.dtype=bfloat16",
    "replay.mode=R3",
    f"engine.micro_batch_tokens={TOKENS}",
    "rollout.max_new_tokens=512",
    "rollout.max_prompt_tokens=512",
]
SHARDED = "engine.distributed_optimizer=true"
LAYOUTS: dict[str, tuple[int, int, int, list[str]]] = {  # layers, world, rank, keys
    "dp": (2, 2, 0, []),
    "tp": (2, 2, 1, ["parallel.tp=2", SHARDED]),
    "pp": (2, 2, 0, ["parallel.pp=2"]),
    "vpp": (4, 2, 1, ["parallel.pp=2", "parallel.vpp=2"]),
    "ep": (2, 4, 3, ["parallel.ep=4"]),
    "etp": (2, 4, 0, ["parallel.tp=2", "parallel.ep=2", "parallel.etp=2"]),
    "cp": (2, 2, 1, ["parallel.cp=2", "engine.recompute=selective"]),
    "first": (4, 16, 0, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=4", SHARDED]),
    "last": (
        2,
        16,
        15,
        ["parallel.tp=2", "parallel.pp=2", "parallel.ep=4", "parallel.cp=2", SHARDED, "engine.recompute=full"],
    ),
}


def model(layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2048,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOPK,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each layout recorded: all in one process, for the seconds that importing the engine takes."""
    requests = []
    for layers, world, rank, keys in LAYOUTS.values():
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(model(layers)))
        requests.append(
            {"keys": [f"model.path={folder}", *KEYS, *keys], "world": world, "rank": rank, "minibatches": 1}
        )
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    run = subprocess.run([sys.executable, "-m", "megarl.simulate"], input=lines, capture_output=True, text=True)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == len(LAYOUTS), run.stderr[-3000:]
    return dict(zip(LAYOUTS, answers, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_update_runs_and_no_tensor_is_on_the_wrong_device(found: dict[str, dict[str, Any]], name: str) -> None:
    assert "failed" not in found[name], found[name]["failed"]
    assert {"gradients", "optimizer step"} <= found[name]["peaks"].keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_peak_is_the_plan(found: dict[str, dict[str, Any]], name: str) -> None:
    layers, world, rank, keys = LAYOUTS[name]
    engine = load_config(None, [*KEYS, *keys])
    layout = Layout(**engine.parallel.model_dump(), world=world)
    training = Training(layout, 2, engine.engine.distributed_optimizer, engine.engine.recompute, TOKENS)
    planned = stage_memory(WeightMap(model(layers)), training, layout.coord(rank).pp)
    peak = found[name]["peaks"]["gradients"]["bytes"]
    assert abs(planned.total / peak - 1) < 0.05, (planned, peak)
