"""What all tests share: one thread a process, and a configuration whose
checkpoint has headers of weights without content, for checks that read no more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from xdist.scheduler import LoadScopeScheduling

from tools.tiny_model import character_tokenizer

HF_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}


class ByServer(LoadScopeScheduling):
    """A file's tests stay on one worker of pytest-xdist, and so do
    those of a folder whose files share a server or a cold start.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = Path(file).parent.name
        return folder if folder in ("e2e", "engine") else file


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """Of the one rank that a file's engines make; its groups are left at the end of the file."""
    from megarl.engine.parallel import destroy_parallel

    yield
    destroy_parallel()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByServer:
    return ByServer(config, log)


def write_weights(folder: Path, hf: dict[str, Any]) -> None:
    """model.safetensors that fits config.json; its content is a hole in the file."""
    from megarl.weights.map.weight_map import WeightMap

    header, end = {}, 0
    for name, shape in WeightMap(hf).hf_shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def hf_config() -> dict[str, Any]:
    """config.json of a small Qwen3-MoE; a copy that a test may change."""
    return dict(HF_CONFIG)


@pytest.fixture
def run_yaml(tmp_path: Path, hf_config: dict[str, Any]) -> Path:
    """A configuration nothing is wrong with: TP2 x PP2 x EP2 on 4 ranks; its files exist, its weights are holes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config))
    character_tokenizer().save(str(folder / "tokenizer.json"))
    write_weights(folder, hf_config)
    for name in ("prompts.jsonl", "valid.jsonl", "demos.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1", "answer": "1", "response": "1"}\n')
    text = f"""
model: {{path: {folder}}}
parallel: {{tp: 2, pp: 2, ep: 2}}
launch: {{trainers: 4}}
batch: {{minibatches: 4}}
rollout: {{max_prompt_tokens: 64, max_new_tokens: 64}}
data: {{prompts: {tmp_path}/prompts.jsonl, reward: digit_sum}}
eval: {{prompts: {tmp_path}/valid.jsonl}}
sft: {{data: {tmp_path}/demos.jsonl}}
run: {{dir: {tmp_path}/run}}
"""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path
