"""Parameters of models on Transformer Engine's layers: names and shapes, by family and layout.

    python tools/te_record.py --out FILE [--stub]

tools/te_record.sh runs it where Transformer Engine is installed; --stub takes tests/unit/te_stub.py in its place. Each
model is built by megatron-core's own spec in host memory, as the last rank of a layout, and held to the weight map: a
name or shape that differs from it is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.tiny_model import tiny_config  # noqa: E402

EXPERTS = dict.fromkeys(("qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe"), ("grouped", "sequential"))
FAMILIES = EXPERTS | dict.fromkeys(("qwen3_tied", "llama"), ("grouped",))  # latent attention has local layers
LAYOUTS = {"tp1": (), "tp2 pp2": ("parallel.tp=2", "parallel.pp=2")}

Parameters = dict[str, list[int]]  # shapes on this rank, by name


def parameters(family: str, keys: list[str], experts: str) -> Parameters:
    from megarl.config import load_config
    from megarl.engine import model as engine_model
    from megarl.engine.device import setup_device
    from megarl.engine.parallel import init_parallel
    from megarl.simulate.step import alone
    from megarl.weights.map.weight_map import WeightMap

    config = load_config(
        None,
        [*keys, f"engine.experts={experts}", "engine.transformer_impl=transformer_engine", "engine.dtype=bfloat16"],
    )
    world = config.parallel.tp * config.parallel.pp
    hf = json.loads(tiny_config(family).to_json_string(use_diff=False))
    with alone(world, world - 1):
        at = init_parallel(config.parallel, setup_device(), 0)
        with _a_gpu(engine_model):
            model = engine_model.build_model(config, WeightMap(hf), at)
        if not model.profile.transformer_engine:
            raise SystemExit(f"{family}: built without Transformer Engine: {model.profile}")
        return {name: list(value.shape) for chunk in model.bare for name, value in chunk.named_parameters()}


@contextmanager
def _a_gpu(engine_model: Any) -> Iterator[None]:
    """What the layers ask for before they are made; these are made in host memory."""
    answers = {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: (9, 0),
        "current_device": lambda: "cpu",
    }
    settings = engine_model.profile_settings

    def unfused(profile: Any) -> dict[str, Any]:
        return settings(profile) | {"moe_permute_fusion": False}  # the dispatcher makes a CUDA tensor for it

    with mock.patch.multiple(torch.cuda, **answers), mock.patch.object(engine_model, "profile_settings", unfused):
        yield


def record() -> dict[str, Any]:
    import transformer_engine

    models = {
        f"{family}, {layout}, {experts}": parameters(
            family, [*keys, *(["parallel.ep=2"] if keys and family in EXPERTS else [])], experts
        )
        for family, kinds in FAMILIES.items()
        for layout, keys in LAYOUTS.items()
        for experts in kinds
    }
    return {"transformer_engine": transformer_engine.__version__, "models": models}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stub", action="store_true")
    args = parser.parse_args(argv)
    if args.stub:
        from tests.unit import te_stub

        te_stub.install()
    found = record()
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in found["models"].items()]
    head = f'{{"transformer_engine": "{found["transformer_engine"]}", "models": {{\n'
    args.out.write_text(head + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    print(f"{len(lines)} models of Transformer Engine {found['transformer_engine']} in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
