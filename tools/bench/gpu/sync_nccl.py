"""The process group of the weight sync: grouped sends and receives
through megarl.weights.transport.groups, on one GPU to itself.

    python -m tools.bench.gpu.sync_nccl --ranks 2      # two GPUs, from rank 0 to rank 1: not yet run

On a CPU two gloo processes take its place, since gloo has no message to itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120.0


def run(smoke: bool) -> Iterator[dict[str, Any]]:
    from tools.bench.gpu.common import ON_GPU

    yield measure(1 if ON_GPU else 2, smoke, "cuda" if ON_GPU else "cpu")


def measure(ranks: int, smoke: bool, device: str, shared: bool = False) -> dict[str, Any]:
    """shared: all ranks on one GPU, through megarl.weights.transport.shared."""
    sizes = (1 << 20, 3, 3) if smoke else (256 << 20, 8, 6)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=rank_of, args=(r, ranks, store.port, device, shared, *sizes)) for r in range(1, ranks)
    ]
    for other in others:
        other.start()
    try:
        times, equal = rank_of(0, ranks, store.port, device, shared, *sizes)
        for other in others:
            other.join(TIMEOUT_S)
            equal = equal and other.exitcode == 0
    finally:
        for other in others:
            other.kill()
    total = sizes[0] * sizes[1]
    median = sorted(times[1:])[len(times[1:]) // 2]
    way = "shared memory" if shared else "nccl" if device == "cuda" else "gloo"
    return {
        "ranks": ranks,
        "way": way,
        "bytes": total,
        "bytes_per_s": total / median,
        "median_s": median,
        "first_s": times[0],
        "equal": equal,
    }


def rank_of(
    rank: int, ranks: int, port: int, device: str, shared: bool, size: int, count: int, repeats: int
) -> tuple[list[float], bool]:
    """Rank 0 sends every bucket to the last rank (itself where it is
    alone), which compares what it got with what was to come.
    """
    from megarl.weights.transport.groups import WeightGroup
    from megarl.weights.transport.shared import SharedGroup

    where = torch.device(device, 0 if shared else rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    group = (SharedGroup if shared else WeightGroup)(store, "bench", rank, ranks, TIMEOUT_S, where)
    sends, receives = rank == 0, rank == ranks - 1
    generator = torch.Generator().manual_seed(0)
    source = [torch.randint(256, (size,), dtype=torch.uint8, generator=generator).to(where) for _ in range(count)]
    target = [torch.zeros(size, dtype=torch.uint8, device=where) for _ in range(count)]
    times = []
    for number in range(repeats):
        begun = time.perf_counter()
        to = [(buffer, ranks - 1) for buffer in source] if sends else []
        of = [(buffer, 0) for buffer in target] if receives else []
        for work in group.exchange(to, of, number):
            work.wait()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    equal = not receives or all(torch.equal(a, b) for a, b in zip(source, target, strict=True))
    if ranks == 1 or not shared:
        group.close()
    assert equal, "what arrived is not what was sent"
    return times, equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.ranks, arguments.smoke, "cuda" if torch.cuda.is_available() else "cpu")))
