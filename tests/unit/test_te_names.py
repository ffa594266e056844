"""megatron-core's own spec built over a stand-in of Transformer Engine (te_stub.py), which is held to a record of the
real one (tools/te_record.sh).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import te_stub; te_stub.install()
from megarl.config import load_config
from megarl.engine.build import init_parallel, build_model, WeightMap
from megarl.engine.device import setup_device
import torch
from megarl.engine import model as module
from megarl.engine.batch import make_packs
settings = module.profile_settings
module.profile_settings = lambda profile: {{**settings(profile), "moe_permute_fusion": False}}  # makes a CUDA tensor
config = load_config(None, ["engine.transformer_impl=transformer_engine"])
at = init_parallel(config.parallel, setup_device(), 0)
model = build_model(config, WeightMap({{**json.loads({hf!r}), "mlp_only_layers": [0]}}), at)  # raises where a name or a shape differs
assert model.profile.transformer_engine and model.profile.adam == "torch", model.profile  # its Adam wants a GPU
print(json.dumps([name for _, name in model.named_entries()]))
# what the attention hands to Transformer Engine, against our own
from megarl.engine.attention import PackedCausalAttention
[pack] = make_packs([[0, 1]], [torch.arange(6), torch.arange(4)], [1, 1], at.layout, at.coord)
attention = model.bare[0].decoder.layers[0].self_attention.core_attention
q, k, v = (torch.randn(pack.padded, 1, heads, 16) for heads in (4, 2, 2))
from megatron.core.transformer.enums import AttnMaskType
how = dict(attn_mask_type=AttnMaskType.causal, attention_bias=None, packed_seq_params=pack.sequences)
out, ours = attention(q, k, v, None, **how), PackedCausalAttention(model.config, 1)(q, k, v, None, **how)
print(json.dumps([tuple(out.shape), attention.seen["shape"], attention.seen["cu_seqlens"].tolist(), float((out - ours).abs().max())]))
"""


ON_A_HOST = """
import json, sys
sys.path.insert(0, {here!r})
import te_stub; te_stub.install()
import torch
from megarl.config import load_config
from megarl.engine.build import init_parallel, build_model, WeightMap
from megarl.engine.device import setup_device
from megarl.engine.model import wrap_for_training
from megarl.engine.optim import build_optimizer
from megatron.core.transformer.moe.moe_utils import router_gating_linear
for sharded in ("false", "true"):
    config = load_config(None, ["engine.transformer_impl=local", f"engine.distributed_optimizer={{sharded}}"])
    at = init_parallel(config.parallel, setup_device(), 0)
    model = build_model(config, WeightMap(json.loads({hf!r})), at)
    wrap_for_training(model, config)
    optimizer, _ = build_optimizer(config, model, 10)
    kinds = {{type(part.optimizer).__module__ for part in optimizer.chained_optimizers}}
    assert all(kind.startswith("torch.optim") for kind in kinds), kinds
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    out = router_gating_linear(x, weight, None, torch.float32)
    out.sum().backward()
    assert torch.equal(out, x @ weight.t()) and weight.grad is not None
"""


@pytest.fixture(scope="module")
def built() -> list:
    from tests.conftest import HF_CONFIG

    script = BUILD.format(here=str(Path(__file__).parent), hf=json.dumps(HF_CONFIG))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_megatrons_own_spec_has_the_names_that_the_map_derives(built: list) -> None:
    names, layer = built[0], "decoder.layers.0."
    assert layer + "self_attention.linear_qkv.layer_norm_weight" in names
    assert layer + "mlp.linear_fc1.layer_norm_weight" in names, "layer 0 is dense: its norm is fused"
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in names, "layer 1 has experts: its norm is not"
    assert "decoder.layers.1.mlp.experts.linear_fc2.weight7" in names


def test_a_process_without_a_gpu_uses_nothing_of_it() -> None:
    """megarl plan, or a reference on the host, where Transformer Engine is installed: its Adam asks for a device when it is
    made, its matrix product when it is called.
    """
    from tests.conftest import HF_CONFIG

    script = ON_A_HOST.format(here=str(Path(__file__).parent), hf=json.dumps(HF_CONFIG))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_stand_in_has_what_the_real_one_was_seen_to_have(tmp_path: Path) -> None:
    """Six families, grouped and sequential experts, whole and as the last rank of TP2 PP2 EP2."""
    found, here = tmp_path / "stub.json", Path(__file__).parent
    script = [sys.executable, str(ROOT / "tools" / "te_record.py"), "--stub", "--out", str(found)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    real, stub = (json.loads(file.read_text(encoding="utf-8")) for file in (here / "te_record.json", found))
    assert real["models"].keys() == stub["models"].keys() and len(real["models"]) == 20
    for name, parameters in real["models"].items():
        assert stub["models"][name] == parameters, name


def test_the_attention_hands_over_the_pack_with_its_edges(built: list) -> None:
    """The stand-in checks the arguments and computes what the real one documents."""
    shape, handed, edges, difference = built[1]
    assert shape == [8, 1, 64] and handed == [8, 4, 16] and edges == [0, 5, 8]
    assert difference < 1e-6
