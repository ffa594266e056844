"""The equality table: whatever the layout, the trainer computes the same thing.

    python tools/equality.py [--quick] [--json FILE] [--write docs/equality.md]

For every layout and every replay mode, log-probabilities, loss and gradient of one mini-batch are
compared with those of a single rank that runs one micro-batch. R3 replays adversarial routes that
differ at every token. Under R3 whole training steps follow: three Adam updates with clipping by the
learner, whose metrics and whose change of every parameter are compared too. The figure is
max |a - b| / max |b|, the worst over all tensors; the limit is 1e-5 in float32. Ranks are real
processes over gloo, one launch for each world size.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.ranks import launch_ranks  # noqa: E402

LIMIT = 1e-5
MODES = ("none", "R2", "R3")


@dataclass(frozen=True)
class Row:
    """One layout. `model` names a checkpoint of MODELS; keys are configuration overrides."""

    name: str
    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    model: str = "moe"
    quick: bool = False


SMALL = {"micro_batch_tokens": 48}  # several micro-batches of different lengths
MODELS = {  # arguments of make_tiny_model; the default family is Qwen3-MoE
    "moe": {"vocab_size": 33},  # padded under TP
    "dense_first": {"dense_layers": [0]},
    "deepseek": {
        "family": "deepseek_v3",
        "top_k": 4,
        "vocab_size": 33,
    },  # latent attention, expert bias, 2 of 4 groups, shared expert, dense first layer
    "qwen2": {"family": "qwen2_moe", "kv_heads": 4},  # QKV bias, a shared expert behind a gate
    "llama": {"family": "llama"},  # no experts
    "deep": {"layers": 8},
    "tied": {"family": "qwen3_tied", "vocab_size": 33},
}
ROWS = [
    Row("1 rank, several micro-batches", 1, engine=SMALL, quick=True),
    Row("1 rank, sequential experts", 1, engine={"experts": "sequential", **SMALL}, quick=True),
    Row("1 rank, selective recompute", 1, engine={"recompute": "selective"}),
    Row("1 rank, full recompute", 1, engine={"recompute": "full", **SMALL}, quick=True),
    Row("1 rank, dense first layer", 1, engine=SMALL, model="dense_first"),
    Row("TP2", 2, {"tp": 2}, SMALL),
    Row("TP2 EP2", 2, {"tp": 2, "ep": 2}, SMALL, quick=True),
    Row("TP2 ETP2", 2, {"tp": 2, "etp": 2}, SMALL, quick=True),
    Row("TP2 EP1 ETP1", 2, {"tp": 2, "ep": 1, "etp": 1}, {"recompute": "full", **SMALL}, quick=True),
    Row("PP2", 2, {"pp": 2}, SMALL),
    Row("PP2 full recompute", 2, {"pp": 2}, {"recompute": "full", **SMALL}, quick=True),
    Row("PP2 dense first layer", 2, {"pp": 2}, SMALL, model="dense_first"),
    Row("PP2 VPP2", 2, {"pp": 2, "vpp": 2}, SMALL),
    Row("PP2 VPP2 full recompute", 2, {"pp": 2, "vpp": 2}, {"recompute": "full", **SMALL}, quick=True),
    Row("DP2", 2, {}, SMALL, quick=True),
    Row("DP2 distributed optimizer", 2, {}, {"distributed_optimizer": True, **SMALL}),
    Row("EP2", 2, {"ep": 2}, SMALL, quick=True),
    Row("EP2 dense first layer", 2, {"ep": 2}, SMALL, model="dense_first"),
    Row("CP2", 2, {"cp": 2}, SMALL, quick=True),
    Row("PP2 uneven (1 + 3 layers)", 2, {"pp": 2, "first_stage_layers": 1}, SMALL),
    Row("PP2 uneven, dense first layer", 2, {"pp": 2, "first_stage_layers": 3}, SMALL, model="dense_first", quick=True),
    Row("TP2 CP2 EP2", 4, {"tp": 2, "cp": 2, "ep": 2}, SMALL, quick=True),
    Row("TP2 CP2 EP2 full recompute", 4, {"tp": 2, "cp": 2, "ep": 2}, {"recompute": "full", **SMALL}),
    Row("PP2 CP2", 4, {"pp": 2, "cp": 2}, SMALL),
    Row("CP4", 4, {"cp": 4}, SMALL),
    Row("TP2 PP2 VPP2 EP2", 4, {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}, SMALL),
    Row("CP2 DP2 distributed optimizer", 4, {"cp": 2}, {"distributed_optimizer": True, **SMALL}),
    Row("TP2 PP2 EP2", 4, {"tp": 2, "pp": 2, "ep": 2}, SMALL, quick=True),
    Row("TP2 PP2 EP2 full recompute", 4, {"tp": 2, "pp": 2, "ep": 2}, {"recompute": "full", **SMALL}),
    Row("TP2 PP2 ETP2", 4, {"tp": 2, "pp": 2, "etp": 2}, SMALL),
    Row("TP2 EP2 DP2", 4, {"tp": 2, "ep": 2}, SMALL),
    Row("TP2 EP4 DP2", 4, {"tp": 2, "ep": 4}, SMALL, quick=True),
    Row("PP2 EP2 DP2", 4, {"pp": 2, "ep": 2}, SMALL),
    Row("PP4", 4, {"pp": 4}, SMALL),
    Row("PP4 VPP2, 8 layers", 4, {"pp": 4, "vpp": 2}, SMALL, model="deep"),
    Row(
        "DeepSeek, TP2 CP2 EP2 full recompute",
        4,
        {"tp": 2, "cp": 2, "ep": 2},
        {"recompute": "full", **SMALL},
        model="deepseek",
    ),
    Row(
        "DeepSeek, TP2 PP2 EP2, first stage all dense",
        4,
        {"tp": 2, "pp": 2, "ep": 2, "first_stage_layers": 1},
        SMALL,
        model="deepseek",
        quick=True,
    ),
    Row(
        "DeepSeek, PP2 VPP2 ETP1 DP2 full recompute",
        4,
        {"pp": 2, "vpp": 2},
        {"recompute": "full", **SMALL},
        model="deepseek",
        quick=True,
    ),
    Row("DeepSeek, PP4, first stage all dense", 4, {"pp": 4}, SMALL, model="deepseek"),
    Row("DeepSeek, PP2 full recompute", 2, {"pp": 2}, {"recompute": "full", **SMALL}, model="deepseek"),
    Row("Qwen2-MoE, TP2 PP2 ETP2", 4, {"tp": 2, "pp": 2, "etp": 2}, SMALL, model="qwen2", quick=True),
    Row("Llama, TP2 PP2", 4, {"tp": 2, "pp": 2}, SMALL, model="llama", quick=True),
    Row("tied embeddings, TP2", 2, {"tp": 2}, SMALL, model="tied"),
    Row("tied embeddings, PP2 VPP2", 2, {"pp": 2, "vpp": 2}, SMALL, model="tied"),
    Row(
        "tied embeddings, PP2 DP2 distributed optimizer",
        4,
        {"pp": 2},
        {"distributed_optimizer": True, **SMALL},
        model="tied",
        quick=True,
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the rows that CI runs")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="write the table as markdown")
    args = parser.parse_args()
    rows = [row for row in ROWS if (row.quick or not args.quick) and args.only in row.name]
    results = compare(rows)
    table = render(results)
    print(table)
    if args.write:
        args.write.write_text(PAGE.format(table=table, rows=len(results)), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failed = [
        name for name, modes in results.items() if not all(v <= LIMIT for mode in modes.values() for v in mode.values())
    ]
    if failed:
        print(f"above {LIMIT:g}: {', '.join(failed)}")
    return 1 if failed else 0


PAGE = """# Equality over layouts

Printed by `python tools/equality.py --write docs/equality.md` ({rows} layouts, float32, gloo). Each figure is the largest
|a - b| / max |b| against a single rank with one micro-batch, over log-probabilities, loss and every gradient tensor; the limit is 1e-5.
R3 replays adversarial routes that differ at every token. The last column is of whole training steps under R3, three Adam updates with
clipping: every metric of the learner, and the change of every parameter beyond the rounding of its storage.

{table}
"""


def compare(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """row -> mode -> {logprobs, loss, grad}, under R3 also {metrics, update}: relative differences from the single rank."""
    import torch

    from tools.tiny_model import make_tiny_model

    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        used = [name for name in MODELS if any(row.model == name for row in rows)]
        for name in used:
            arguments = dict(MODELS[name])
            dense = arguments.pop("dense_layers", None)
            make_tiny_model(folder / name, **arguments)
            if dense:
                _make_dense(
                    folder / name, json.loads((folder / name / "config.json").read_text(encoding="utf-8")), dense
                )
        reference = [Row(f"reference {name}", 1, engine={"micro_batch_tokens": 4096}, model=name) for name in used]
        for world in (1, 2, 4):
            chosen = [row for row in (reference if world == 1 else []) + rows if row.world == world]
            if chosen:
                _launch(folder, world, chosen)
        for row in rows:
            want = torch.load(folder / f"reference {row.model}.pt")
            got = torch.load(folder / f"{row.name}.pt")
            rounding = want["R3"].pop("rounding")
            results[row.name] = {
                mode: {
                    key: difference(got[mode][key], want[mode][key], rounding if key == "update" else {})
                    for key in want[mode]
                }
                for mode in MODES
            }
    return results


def _make_dense(folder: Path, config: dict[str, Any], dense_layers: list[int]) -> None:
    """Replaces the experts of some layers by one dense MLP of `intermediate_size`."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    for layer in dense_layers:
        prefix = f"model.layers.{layer}.mlp."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            tensors[f"{prefix}{name}_proj.weight"] = torch.randn(shape, generator=generator) * 0.08
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "mlp_only_layers": dense_layers}), encoding="utf-8")


def _launch(folder: Path, world: int, rows: list[Row]) -> None:
    names = [str(ROWS.index(row)) if row in ROWS else row.model for row in rows]
    done = launch_ranks(ROOT / "tools" / "equality_ranks.py", world, str(folder), *names, timeout_s=600)
    if done.returncode:
        raise SystemExit(f"the {world}-rank launch failed:\n{done.stderr[-3000:]}")


def difference(got: Any, want: Any, rounding: Mapping[str, float] | float = 0.0) -> float:
    """max |a - b| / max |b|: of a tensor, or the worst of a dictionary of tensors. `rounding` is taken off |a - b|."""
    if isinstance(want, dict):
        if got.keys() != want.keys():
            return math.inf
        of = rounding if isinstance(rounding, Mapping) else {}
        return max(difference(got[name], want[name], of.get(name, 0.0)) for name in want)
    scale, largest = float(want.abs().max()), float((got - want).abs().max())
    allowed = rounding if isinstance(rounding, float) else 0.0
    return math.inf if math.isnan(largest) else max(largest - allowed, 0.0) / (scale or 1.0)


def render(results: dict[str, dict[str, dict[str, float]]]) -> str:
    columns = [(mode, ("logprobs", "loss", "grad")) for mode in MODES] + [("R3", ("metrics", "update"))]
    titles = [*(f"{mode}: log-prob, loss, gradient" for mode in MODES), "steps: metrics, update"]
    lines = ["| layout | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for name, modes in results.items():
        cells = [", ".join(f"{modes[mode][key]:.1e}" for key in keys) for mode, keys in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
