"""How much of what is computed is padding, and how evenly data-parallel ranks are loaded, on lengths with a heavy tail.

    python tools/bench/packing.py [--responses 1024] [--budget 32768] [--seeds 20]

Lengths are log-normal (median 1500 tokens, sigma 1.0, cut at 32,768). Padding counts rows of packs that belong to no
response, empty packs included. Attention pads further inside a pack, to the longest sequence of each of its rectangles:
the share of its cells is printed beside it. Imbalance is the most loaded replica over the mean, minus 1.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megarl.engine.attention import groups_of_segments  # noqa: E402
from megarl.engine.batch import assign, pack_lengths  # noqa: E402
from megarl.weights.map.layout import Layout  # noqa: E402

LAYOUTS = [
    Layout(world=1),
    Layout(world=8),
    Layout(tp=2, pp=2, world=32),
    Layout(tp=4, cp=2, world=64),
    Layout(tp=2, pp=2, vpp=2, world=64),
    Layout(tp=2, pp=4, vpp=2, world=64),
]


def measure(layout: Layout, rows: list[int], budget: int) -> tuple[float, float, float]:
    """(padding share of rows, padding share of attention's rectangles, imbalance)."""
    packed = assign(rows, layout.dp, budget, layout.packs_multiple)
    computed = cells = 0
    for packs in packed:
        lengths = pack_lengths([sum(rows[i] for i in pack) for pack in packs], layout)
        computed += sum(lengths)
        cells += sum(
            len(group) * rows[pack[group[0]]] for pack in packs for group in groups_of_segments([rows[i] for i in pack])
        )
    load = [sum(rows[i] for pack in packs for i in pack) for packs in packed]
    return 1 - sum(rows) / computed, 1 - sum(rows) / cells, max(load) / statistics.mean(load) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=1024)
    parser.add_argument("--budget", type=int, default=32_768)
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    print("worst of all seeds         padding   in attention   imbalance")
    for layout in LAYOUTS:
        results = []
        for seed in range(args.seeds):
            rng = random.Random(seed)
            rows = [min(args.budget, max(2, int(1500 * rng.lognormvariate(0, 1.0)))) for _ in range(args.responses)]
            results.append(measure(layout, rows, args.budget))
        name = " ".join(
            f"{key}{value}"
            for key, value in (("tp", layout.tp), ("pp", layout.pp), ("vpp", layout.vpp), ("cp", layout.cp))
        )
        worst = [max(result[i] for result in results) for i in range(3)]
        print(f"{name:18} dp{layout.dp:<4}" + "".join(f"{value:12.2%}" for value in worst))


if __name__ == "__main__":
    main()
