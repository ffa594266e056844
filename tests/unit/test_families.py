"""Every family on a tiny random checkpoint: the map holds its tensors,
and the engine computes what transformers computes.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megarl.config import load_config
from megarl.engine.attention import PackedCausalAttention, readable
from megarl.engine.batch import make_packs
from megarl.engine.build import build_engine
from megarl.engine.parallel import destroy_parallel
from megarl.weights.map.families.common import rope_parameters
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import FAMILIES, WeightMap, load_hf_config
from megarl.weights.reshard.gather import plan_gather

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools import tiny_model  # noqa: E402

LENGTHS = (23, 9, 40)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
# name -> family, arguments of make_tiny_model: each family as it is, and each choice that its config.json has
MODELS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in tiny_model.FAMILIES} | {
    "qwen3_moe, gates not renormalised": ("qwen3_moe", dict(changes=dict(norm_topk_prob=False))),
    "qwen3_moe, dense first layer": ("qwen3_moe", dict(changes=dict(mlp_only_layers=[0]))),
    "qwen2_moe, gates renormalised": ("qwen2_moe", dict(changes=dict(norm_topk_prob=True))),
    "qwen2_moe, every second layer, no QKV bias": (
        "qwen2_moe",
        dict(layers=4, changes=dict(decoder_sparse_step=2, qkv_bias=False)),
    ),
    "deepseek_v3, 4 of 16 experts in 2 of 4 groups": ("deepseek_v3", dict(top_k=4, experts=16)),
    "deepseek_v3, yarn without mscale": (
        "deepseek_v3",
        dict(
            changes=dict(
                rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64)
            )
        ),
    ),
    "deepseek_v3, narrow values, coarse epsilon": ("deepseek_v3", dict(changes=dict(v_head_dim=24, rms_norm_eps=1e-3))),
    "deepseek_v3, one expert a token, gates not renormalised": (
        "deepseek_v3",
        dict(top_k=1, changes=dict(n_group=1, topk_group=1, norm_topk_prob=False)),
    ),
    "glm4_moe, no QK norm, no QKV bias": ("glm4_moe", dict(changes=dict(use_qk_norm=False, attention_bias=False))),
    "mixtral, widths that grouped_mm does not take": ("mixtral", dict(hidden=60, changes=dict(intermediate_size=90))),
    "qwen3_moe, tied embeddings": ("qwen3_moe", dict(changes=dict(tie_word_embeddings=True))),
    "llama, rope scaling of Llama 3.1": ("llama", dict(changes=dict(rope_parameters=LLAMA3))),
}
LAYOUTS = [
    Layout(),
    Layout(tp=2, pp=2, ep=2, world=4),
    Layout(pp=2, vpp=2, world=2),
    Layout(tp=2, etp=2, world=4),
    Layout(ep=4, world=8),
    Layout(tp=4, pp=4, ep=2, etp=2, world=16),
    Layout(tp=2, cp=2, ep=4, world=8),
    Layout(pp=2, first_stage_layers=1, world=4),
]


def tiny(folder: Path, name: str, layers: int = 3) -> Path:
    family, arguments = MODELS[name]
    path = folder / name.replace(" ", "_")
    return path if path.exists() else tiny_model.make_tiny_model(path, family, **{"layers": layers, **arguments})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def scored(path: Path, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """The engine's log-probabilities, all sequences in one pack."""
    engine = build_engine(load_config(None, [f"model.path={path}"]))
    at = engine.model.parallel
    [pack] = make_packs([list(range(len(tokens)))], tokens, [1] * len(tokens), at.layout, at.coord)
    [(logprobs, _)] = engine.logprobs([pack], "record" if engine.model.weight_map.moe_layers else "off")
    destroy_parallel()
    return [logprobs[start : start + len(t) - 1] for start, t in zip(pack.starts, tokens)]


@torch.no_grad()
def judged(path: Path, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    return [model(t[None]).logits[0, :-1].log_softmax(-1).gather(1, t[1:, None]).squeeze(1) for t in tokens]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_equal_those_of_transformers(folder: Path, name: str) -> None:
    path = tiny(folder, name)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 20, (n,), generator=generator) for n in LENGTHS]
    want = judged(path, tokens)
    _to_the_older_keys(path)
    for got, expected in zip(scored(path, tokens), want):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_torchs_varlen_kernel_reads_what_the_layers_hand_over(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy is made of values that lie in one product with queries and keys."""
    seen, forward = list[torch.Tensor](), PackedCausalAttention.forward

    def noted(self: Any, *qkv: torch.Tensor | None, **given: Any) -> torch.Tensor:
        seen.extend(x for x in qkv if x is not None)
        return forward(self, *qkv, **given)

    monkeypatch.setattr(PackedCausalAttention, "forward", noted)
    scored(tiny(folder, name), [torch.arange(3, 12)])
    assert any(not x.is_contiguous() for x in seen) or name == "deepseek_v3"
    assert seen and all(readable(x[:, 0]).data_ptr() == x.data_ptr() for x in seen)


def _to_the_older_keys(path: Path) -> None:
    """Rewrites config.json with the keys of transformers 4 and checks that it decides the same model."""
    new = load_hf_config(path)
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(new["rope_parameters"])
    old |= {"torch_dtype": new["dtype"], "rope_theta": rope.pop("rope_theta")}
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    before, after = WeightMap(new), WeightMap(old)
    assert (before.model, before.gpt, before.entries) == (after.model, after.gpt, after.entries)
    (path / "config.json").write_text(json.dumps(old))


def test_fault_13_sequential_experts_are_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny(folder, "mixtral, widths that grouped_mm does not take")
    engine = build_engine(load_config(None, [f"model.path={path}"]))
    assert engine.model.profile.experts == "sequential"
    destroy_parallel()
    says = "the experts' width on a rank 90 is no multiple of 4: the experts are computed one after the other"
    assert capsys.readouterr().out.count(says) == 1


@pytest.mark.parametrize("name", MODELS)
def test_the_map_holds_the_tensors_of_the_file(folder: Path, name: str) -> None:
    path = tiny(folder, name)
    with safe_open(path / "model.safetensors", "pt") as file:
        names = file.keys()
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in names}
        dull = [key for key in shapes if file.get_tensor(key).std() < 0.01 and shapes[key] != (1,)]
    weight_map = WeightMap(load_hf_config(path))
    assert weight_map.hf_shapes == shapes and not dull
    assert all(name.endswith("e_score_correction_bias") for name in weight_map.hf_float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cutting_and_putting_together_is_the_identity(name: str, layout: Layout) -> None:
    family, arguments = MODELS[name]
    arguments = {"layers": 4, "vocab_size": 35, "heads": 4, "kv_heads": 4, **arguments}  # 35: padded under TP
    weight_map = WeightMap(tiny_model.tiny_config(family, **arguments).to_dict())
    if not weight_map.num_experts and layout.ep * layout.etp > 1:
        layout = Layout(tp=layout.tp, pp=layout.pp, cp=layout.cp, world=layout.world)
    generator = torch.Generator().manual_seed(0)
    weights = {tensor: torch.randn(shape, generator=generator) for tensor, shape in weight_map.hf_shapes.items()}
    held: list[dict[tuple[int, str], torch.Tensor]] = []
    for rank in range(layout.world):
        held.append({})
        for param in weight_map.params(layout, layout.coord(rank)):
            local = torch.zeros(param.shape)
            for piece in param.pieces:
                local[piece.local.slices] = weights[piece.hf_name][piece.rect.slices]
            held[rank][param.chunk, param.name] = local
    for tensor, sends in plan_gather(weight_map, layout).items():
        full = torch.full(weight_map.hf_shapes[tensor], torch.nan)
        for send in sends:
            full[send.transfer.rect.slices] = send.transfer.cut(held[send.rank])
        assert torch.equal(full, weights[tensor]), tensor


REFUSED = [
    ("qwen3_moe", dict(attention_bias=True), "attention_bias true"),
    ("qwen3_moe", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    ("qwen3_moe", dict(num_experts_per_tok=1, norm_topk_prob=True), "num_experts_per_tok 1 with renormalised gates"),
    ("qwen2_moe", dict(use_sliding_window=True), "use_sliding_window true"),
    ("mixtral", dict(sliding_window=4096), "sliding_window 4096"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "'sliding_attention'"),
    ("qwen3", dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "rope scaling 'yarn'"),
    ("llama", dict(mlp_bias=True), "mlp_bias true"),
    ("llama", dict(rope_parameters=dict(LLAMA3, low_freq_factor=2.0)), "'llama3' with low_freq_factor 2.0"),
    ("llama", dict(rope_parameters=dict(rope_type="longrope")), "rope scaling 'longrope'"),
    ("deepseek_v3", dict(rope_interleave=False), "rope_interleave false"),
    ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func 'softmax'"),
    ("deepseek_v3", dict(topk_method="greedy"), "topk_method 'greedy'"),
    ("deepseek_v3", dict(moe_layer_freq=2), "moe_layer_freq 2"),
    ("deepseek_v3", dict(norm_topk_prob=False), "norm_topk_prob False with 2 experts"),
    ("deepseek_v3", dict(n_group=4, topk_group=2), "topk_group 2 of 4 with 2 experts"),
    (
        "deepseek_v3",
        dict(
            rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, mscale_all_dim=1.0)
        ),
        "'yarn' with mscale_all_dim 1.0",
    ),
    (
        "deepseek_v3",
        dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7)),
        "'yarn' with mscale 0.7",
    ),
    ("deepseek_v3", dict(rope_parameters=dict(rope_type="yarn", partial_rotary_factor=0.5)), "'yarn' with factor None"),
    ("deepseek_v3", dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    ("qwen3_moe", dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    ("llama", dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.25)), "partial_rotary_factor 0.25"),
    ("qwen3_moe", dict(shared_expert_intermediate_size=64), "shared_expert_intermediate_size"),
    ("qwen3", dict(rope_parameters=dict(full_attention=dict(rope_theta=1e6))), "rope_parameters of 'full_attention'"),
    ("deepseek_v3", dict(quantization_config=dict(quant_method="gptq")), "quant_method 'gptq'"),
    ("glm4_moe", dict(quantization_config=dict(quant_method="fp8")), "'fp8' without weight_block_size"),
]


@pytest.mark.parametrize(("family", "changes", "says"), REFUSED, ids=[says for _, _, says in REFUSED])
def test_what_is_not_supported_is_refused_by_name(family: str, changes: dict[str, Any], says: str) -> None:
    from megarl.errors import UserError

    config = {**tiny_model.tiny_config(family).to_dict(), **changes}
    with pytest.raises(UserError, match=r"^model\.path: .* is not supported; ") as error:
        WeightMap(config)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_key_is_named() -> None:
    from megarl.errors import UserError

    config = tiny_model.tiny_config("deepseek_v3").to_dict()
    del config["kv_lora_rank"]
    with pytest.raises(UserError, match="deepseek_v3 has no 'kv_lora_rank'"):
        WeightMap(config)


def without(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """config.json without one of its keys, for every key, those of the rope in both generations included."""
    config = {key: value for key, value in config.items() if key != "model_type"}
    rope = config["rope_parameters"]
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    older |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope.get("partial_rotary_factor")}
    older["rope_scaling"] = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    for whole in (config, older):
        for key in whole:
            yield key, {other: value for other, value in whole.items() if other != key}
        inner = "rope_parameters" if "rope_parameters" in whole else "rope_scaling"
        for key in whole[inner]:
            yield f"{inner}.{key}", {**whole, inner: {k: v for k, v in whole[inner].items() if k != key}}


def resolved(family: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers makes of a config.json; None where it refuses it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(family, **copy.deepcopy(config)).to_dict()
    except Exception:
        return None


@pytest.mark.parametrize("name", MODELS)
def test_fault_25_a_missing_key_is_the_default_of_transformers_or_refused(name: str) -> None:
    """Whichever key a config.json lacks, megarl sees the model that transformers sees, or says what is missing."""
    from megarl.errors import UserError

    family, arguments = MODELS[name]
    config = tiny_model.tiny_config(family, **arguments).to_dict()
    family = config["model_type"]
    taken, refused = set(), set()
    for key, given in without(config):
        theirs = resolved(family, given)
        try:
            mine = WeightMap({"model_type": family, **given})
        except UserError:
            refused.add(key)
            continue
        assert theirs is not None, f"{key}: transformers has no default, megarl took one"
        want = WeightMap({**theirs, "model_type": family})
        assert (mine.model, mine.gpt, mine.entries) == (want.model, want.gpt, want.entries), key
        taken.add(key)
    assert {"hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"} <= refused
    assert {"num_key_value_heads", "rope_parameters.rope_theta", "rope_theta"} <= taken


def test_fault_25_deepseek_groups_by_default() -> None:
    """n_group and topk_group are 8 and 4 where config.json names none."""
    config = tiny_model.tiny_config("deepseek_v3", experts=16, top_k=8).to_dict()
    del config["n_group"], config["topk_group"]
    model = WeightMap(config).model
    assert (model["moe_router_num_groups"], model["moe_router_group_topk"]) == (8, 4)


def test_rope_parameters_have_one_form() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 40}, "partial_rotary_factor": 0.5}
    new = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 40, "partial_rotary_factor": 0.5}}
    one = {key: value for key, value in rope_parameters(old).items() if key != "type"}
    assert one == rope_parameters(new)
    assert rope_parameters({})["rope_type"] == "default"


def test_every_family_has_a_tiny_model() -> None:
    assert {tiny_model.tiny_config(family).model_type for family in tiny_model.FAMILIES} == set(FAMILIES)
