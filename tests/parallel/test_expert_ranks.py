"""Grouped experts on two real ranks: against the sequential ones under
EP, ETP and TP with whole experts, one rank left without rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ["ep=2", "tp=2 ep=2", "tp=2 etp=2", "tp=2 ep=1 etp=1"]


def test_grouped_experts_equal_sequential_ones_on_two_ranks(tmp_path):
    sys.path.insert(0, str(ROOT))
    from tools.ranks import launch_ranks
    from tools.tiny_model import make_tiny_model

    model = make_tiny_model(tmp_path / "model", layers=2)
    done = launch_ranks(__file__, 2, str(model), timeout_s=600)
    assert done.returncode == 0, done.stderr[-2000:]


def compare(path: str, layout: str) -> None:
    import torch

    from megarl.config import load_config
    from megarl.engine.build import build_engine
    from megarl.replay.context import replay_schedule

    results: list[dict[str, dict[str, torch.Tensor]]] = []
    for kind in ("sequential", "grouped"):
        config = load_config(
            None, [f"model.path={path}", f"engine.experts={kind}", *(f"parallel.{key}" for key in layout.split())]
        )
        engine = build_engine(config, optimizer_steps=1)
        moe = engine.model.bare[0].decoder.layers[0].mlp
        result = {}
        for name, experts in (("spread", 8), ("all rows on the first two", 2)):
            generator = torch.Generator().manual_seed(engine.model.parallel.coord.rank)
            hidden = torch.randn(40, 1, 64, generator=generator).requires_grad_()
            routes = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(40)])[:, None]
            engine.model.chunks[0].zero_grad_buffer()
            with replay_schedule([[moe.router]]) as replay, replay.forward(0, routes, replay=True):
                out = moe(hidden)[0]
            out.backward(torch.randn(out.shape, generator=generator))
            grads = {key: p.main_grad.clone() for key, p in moe.named_parameters()}
            result[name] = {"out": out.detach(), "hidden": hidden.grad, **grads}
        results.append(result)
    for name, want in results[0].items():
        for key, tensor in want.items():
            difference = (results[1][name][key] - tensor).abs().max()
            assert difference <= 1e-6 * tensor.abs().max(), f"{layout}: {name}, {key}: {difference}"
            idle = "local_experts" in key and name != "spread"
            assert idle or tensor.abs().max() > 0, f"{layout}: {name}, {key}: all zero, the test tests nothing"


if __name__ == "__main__":
    for layout in LAYOUTS:
        compare(sys.argv[1], layout)
