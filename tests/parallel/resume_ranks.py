"""Checkpoints between layouts, inside torchrun ranks or alone: `resume_ranks.py MODEL FOLDER PHASE`.

A phase raises where it fails. In order: `begin` (one rank), `spread` (four ranks), `gather` (one rank).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megarl.config import load_config
from megarl.engine.adam_state import parts_of
from megarl.engine.batch import make_packs
from megarl.engine.build import build_engine
from megarl.engine.checkpoint import load_checkpoint, save_checkpoint
from megarl.engine.parallel import destroy_parallel
from megarl.engine.step import Engine
from megarl.weights.files.tensors import tensor_of
from megarl.weights.files.torch_dist import TorchDistReader
from megarl.weights.rect import Rect

SHARDED = "engine.distributed_optimizer=true"
TP2_PP2_EP2 = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]
LAYOUTS = {
    "one": [],
    "one_sharded": [SHARDED],
    "tp2_pp2_ep2": TP2_PP2_EP2,
    "tp2_pp2_ep2_sharded": [*TP2_PP2_EP2, SHARDED],
    "ep4_sharded": ["parallel.ep=4", SHARDED],
    "tp2_etp2": ["parallel.tp=2", "parallel.etp=2"],
    "pp2_vpp2_tp2": ["parallel.pp=2", "parallel.vpp=2", "parallel.tp=2"],
    "cp2_tp2_sharded": ["parallel.cp=2", "parallel.tp=2", SHARDED],
}
ALONE = ("one", "one_sharded")
LR = 1e-3


def build(model: str, layout: str) -> Engine:
    settings = [f"model.path={model}", f"train.lr={LR}", "train.lr_decay_style=linear", *LAYOUTS[layout]]
    return build_engine(load_config(None, settings), optimizer_steps=10)


def update(engine: Engine, seed: int) -> None:
    """The same step in every layout: eight responses, dealt to the data-parallel ranks."""
    at = engine.model.parallel
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 14, (12,), generator=generator) for _ in range(8)]
    mine = [i for i in range(8) if i % at.layout.dp == at.coord.dp]
    halves = [mine[: len(mine) // 2], mine[len(mine) // 2 :]]
    packs = make_packs(halves, tokens, [2] * 8, at.layout, at.coord)
    engine.update(packs, "off", lambda pack, logprobs, entropy: (-(logprobs * pack.mask).sum() / 8, {}))


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """All that this rank holds: weights, buffers, and what Adam keeps."""
    held = {f"{param.chunk}.{param.name}": tensor.detach() for param, tensor in engine.model.params()}
    for number, part in enumerate(parts_of(engine.optimizer)):
        for group in part.optimizer.param_groups:
            for i, tensor in enumerate(group["params"]):
                held[f"{number}.{i}.master"] = tensor.detach()
                held |= {f"{number}.{i}.{name}": one for name, one in part.optimizer.state[tensor].items()}
    return held


def scramble(engine: Engine) -> None:
    for name, tensor in state(engine).items():
        tensor.fill_(77) if name.endswith("step") else tensor.uniform_(-1, 1)


def begin(model: str, folder: Path) -> None:
    engine = build(model, "one")
    for seed in range(2):
        update(engine, seed)
    save(engine, folder, "one")
    update(engine, 2)
    save(engine, folder / "third", "one")
    do_again(model, folder, "one", engine)
    pass_on(model, folder, "one_sharded")


def pass_on(model: str, folder: Path, layout: str) -> None:
    """What a layout loads it saves again, bit for bit; and its next step is that of the run it goes on from."""
    engine = build(model, layout)
    load_checkpoint(engine, folder / "one" / "step_2")
    save(engine, folder, layout)
    update(engine, 2)
    save(engine, folder / "third", layout)
    if dist.get_rank() == 0:
        compare(folder / "one" / "step_2", folder / layout / "step_2", 0.0)
        compare(folder / "third" / "one" / "step_2", folder / "third" / layout / "step_2", 0.02)
    do_again(model, folder, layout, engine)


def do_again(model: str, folder: Path, layout: str, went_on: Engine) -> None:
    """The step after a resume from a layout's own checkpoint is that of the engine that went on, bit for bit."""
    want = {name: tensor.clone() for name, tensor in state(went_on).items()}
    engine = build(model, layout)
    load_checkpoint(engine, folder / layout / "step_2")
    update(engine, 2)
    wrong = [name for name, tensor in state(engine).items() if not torch.equal(want[name], tensor)]
    assert not wrong, (layout, wrong[:3])


def save(engine: Engine, folder: Path, layout: str) -> None:
    save_checkpoint(engine, folder / layout, 2, {"optimizer_steps": 2}, keep=1)


def compare(want: Path, got: Path, tolerance: float) -> None:
    """Two checkpoints, tensor by tensor. tolerance: of a weight in lr, of a moment in the largest of its tensor."""
    a, b = TorchDistReader(want), TorchDistReader(got)
    assert a.tensors.keys() == b.tensors.keys(), sorted(a.tensors.keys() ^ b.tensors.keys())[:3]
    for key in a.tensors:
        shape = tuple(map(min, a.tensors[key].shape, b.tensors[key].shape))  # a padded vocabulary
        rect, dtype = Rect.whole(shape), a.tensors[key].dtype
        one, other = (tensor_of(reader.read(key, rect), dtype) for reader in (a, b))
        if not tolerance:
            assert torch.equal(one, other), (got, key)
        else:
            size = one.abs().max() if "exp_avg" in key else LR
            assert (one - other).abs().max() <= tolerance * size, (got, key)
    a.close(), b.close()


def take_over(model: str, folder: Path, layout: str) -> None:
    """Fills an engine of noise from a checkpoint of every layout: each gives the same state, bit for bit."""
    engine, want = build(model, layout), {}
    for source in LAYOUTS:
        load_checkpoint(engine, folder / source / "step_2")
        got = state(engine)
        want = want or {name: tensor.clone() for name, tensor in got.items()}
        wrong = [name for name in want if not torch.equal(want[name], got[name])]
        assert not wrong and want.keys() == got.keys(), (source, layout, wrong[:3])
        assert all(float(tensor) == 2 for name, tensor in want.items() if name.endswith("step"))
        scramble(engine)


def spread(model: str, folder: Path) -> None:
    layouts = [layout for layout in LAYOUTS if layout not in ALONE]
    for layout in layouts:
        pass_on(model, folder, layout)
    for layout in layouts:
        take_over(model, folder, layout)


def gather(model: str, folder: Path) -> None:
    for layout in ALONE:
        take_over(model, folder, layout)


PHASES: dict[str, Any] = {phase.__name__: phase for phase in (begin, spread, gather)}

if __name__ == "__main__":
    PHASES[sys.argv[3]](sys.argv[1], Path(sys.argv[2]))
    if dist.get_rank() == 0:
        print(f"ok {sys.argv[3]}", flush=True)
    destroy_parallel()
