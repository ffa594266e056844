"""Weights to a second process on the same GPU by CUDA IPC, through the group of a colocated weight sync
(megarl.weights.transport.shared).

Beside it a device-to-device copy of as many bytes inside one process: what the hardware allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tools.bench.gpu.common import DEVICE, seconds
from tools.bench.gpu.sync_nccl import measure


def run(smoke: bool) -> Iterator[dict[str, Any]]:
    figures = measure(2, smoke, DEVICE.device.type, shared=True)
    source = torch.randint(256, (figures["bytes"],), dtype=torch.uint8, device=DEVICE.device)
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source), 5, 2)
    rates = {
        "sync_bytes_per_s": figures.pop("bytes_per_s"),
        "copy_bytes_per_s": figures["bytes"] / copy_s,
    }  # bytes moved once, in both
    yield {**figures, **rates, "of_copy": copy_s / figures["median_s"]}
