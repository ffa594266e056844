"""Weights to a second process on the same GPU by CUDA IPC: bytes a second from the sender's buckets into the receiver's own tensors.

Beside it a device-to-device copy of the same buckets inside one process: what the hardware allows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch

from megarl.weights.ipc import open_shared, share
from tools.bench.gpu.common import DEVICE, ON_GPU, seconds


def run(smoke: bool) -> dict[str, Any]:
    size, count = (1 << 20, 4) if smoke else (256 << 20, 16)
    buckets = [torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE.device) for _ in range(count)]
    handles = [share(bucket) for bucket in buckets]
    _wait()
    reader = subprocess.Popen([sys.executable, "-m", "tools.bench.gpu.sync_ipc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdin is not None and reader.stdout is not None
    times, sums = [], []
    try:
        reader.stdin.write(json.dumps(size * count) + "\n")
        reader.stdin.flush()
        reader.stdout.readline()
        for _ in range(2 if smoke else 6):
            begun = time.perf_counter()
            reader.stdin.write(json.dumps(handles) + "\n")
            reader.stdin.flush()
            reader.stdout.readline()
            times.append(time.perf_counter() - begun)
            sums.append(json.loads(reader.stdout.readline())["sum"])
        reader.stdin.close()
        reader.wait(timeout=60)
    finally:
        reader.kill()
    expected = sum(int(bucket.sum(dtype=torch.int64)) for bucket in buckets)
    target = torch.empty_like(buckets[0])
    copy_s = seconds(lambda: [target.copy_(bucket) for bucket in buckets], 5, 2)
    total, best = size * count, sorted(times[1:])[len(times[1:]) // 2]
    return {
        "bytes": total,
        "buckets": count,
        "first_s": times[0],  # opens the handles
        "sync_bytes_per_s": total / best,
        "copy_bytes_per_s": total / copy_s,  # bytes moved once, as the line above counts
        "of_copy": copy_s / best,
        "equal": all(found == expected for found in sums),
    }


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def receive() -> None:
    """The second process: a line of handles in, one line of JSON out."""
    own = torch.empty(json.loads(sys.stdin.readline()), dtype=torch.uint8, device=DEVICE.device)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        at = 0
        for handle in json.loads(line):
            view = open_shared(handle, DEVICE.device)
            own[at : at + view.numel()].copy_(view)
            at += view.numel()
        _wait()
        print(json.dumps({"done": True}), flush=True)  # before the sum: the sender's clock runs until here
        print(json.dumps({"sum": int(own.sum(dtype=torch.int64))}), flush=True)


if __name__ == "__main__":
    receive()
