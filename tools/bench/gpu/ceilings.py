"""The two ceilings of this card, measured: a large device-to-device
copy and a large bf16 matrix product, on random data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tools.bench.gpu.common import DEVICE, seconds


def run(smoke: bool) -> Iterator[dict[str, Any]]:
    n, size = (128, 1 << 16) if smoke else (8192, 4 << 30)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE.device).random_()
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source))
    yield {"copy_bytes_per_s": 2 * size / copy_s, "copied_bytes": size}
    a, b = (torch.randn(n, n, device=DEVICE.device, dtype=torch.bfloat16) for _ in range(2))
    matmul_s = seconds(lambda: a @ b)
    yield {"matmul_flops_per_s": 2 * n**3 / matmul_s, "matmul_n": n}
