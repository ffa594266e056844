"""Whether a rollout worker computes with what it received: by sums of the numbers' bits, layer by layer.

Loading moves numbers, stacks and transposes them, packs experts for a kernel: that changes no sum of their bits, while
a layer that kept its old numbers, or an expert of zeros, does. In bfloat16 the canary sees no single expert of a large
model; this does, exactly. Numbers within a layer that changed places are the digests' and the canary's to see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
WORDS = {2: torch.int16, 4: torch.int32}  # by bytes of a number


def part_of(name: str) -> str:
    """Of a tensor, by its Hugging Face or vLLM's name: both stack and fuse within such a part."""
    layer = LAYER.search(name)
    if layer is None:
        return "embedding, norm and head"
    routed = ".experts." in name and "shared_expert" not in name
    return f"layer {layer[1]}, {'experts' if routed else 'all but experts'}"


class BitSums:
    """dtype: in which numbers are compared, the model's. Nothing waits for a device until `numbers`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sums: dict[str, Tensor] = {}

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        by_part: dict[str, list[Tensor]] = {}
        for name, tensor in tensors:
            if tensor.is_floating_point() and tensor.itemsize in WORDS:
                by_part.setdefault(part_of(name), []).append(tensor.detach())
        for part, found in by_part.items():
            if found[0].is_cpu:
                total = torch.tensor(sum(self._sum_on_cpu(tensor) for tensor in found))
            else:  # small ones in one call
                whole = found[0] if len(found) == 1 else torch.cat([one.to(self._dtype).reshape(-1) for one in found])
                total = whole.to(self._dtype).view(WORDS[self._dtype.itemsize]).sum(dtype=torch.int64)
            self._sums[part] = self._sums[part] + total if part in self._sums else total

    def _sum_on_cpu(self, tensor: Tensor) -> int:
        """numpy's: torch's sum of int16 as int64 is far slower there."""
        words = tensor.to(self._dtype).view(WORDS[self._dtype.itemsize])
        return int(words.numpy().sum(dtype=np.int64))

    def numbers(self) -> dict[str, int]:
        return dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist(), strict=True)) if self._sums else {}


class HeldCheck:
    """Over the syncs of one worker. What a kernel keeps out of sight, or in another dtype, agrees at no sync. Which
    parts can be held to this the first sync of a run tells, whose digests are compared (sync.digests), and `agreeing`
    those that come later: the parts that agreed then. Without it a worker's own first sync tells.
    """

    def __init__(self, agreeing: Iterable[str] | None = None) -> None:
        self.agreeing = None if agreeing is None else set(agreeing)

    def wrong(self, received: dict[str, int], held: dict[str, int]) -> list[str]:
        """Parts that hold other numbers than they received, of those that can be held to it."""
        same = {part for part, total in received.items() if held.get(part) == total}
        if self.agreeing is None:
            self.agreeing = same
        return [part for part in received if part in self.agreeing - same]
