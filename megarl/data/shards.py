"""Demonstrations as token shards on disk: tokenised once, by one rank, then mapped into memory by all.

tokens_00000.npy ...   int32, demonstrations one after the other index.npy              int64 [demonstrations, 4]:
shard, first token, tokens, tokens of the prompt
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

SHARD_TOKENS = 2**26  # 256 MiB a file


def write_shards(data: Iterable[tuple[list[int], int]], folder: Path, shard_tokens: int = SHARD_TOKENS) -> None:
    """data: (tokens of prompt and response, length of the prompt). The
    index is written last: a folder that has one is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.npy").unlink(missing_ok=True)
    index: list[tuple[int, int, int, int]] = []
    arrays: list[np.ndarray] = []
    shard = start = 0
    for tokens, prompt_len in data:
        if arrays and start + len(tokens) > shard_tokens:
            np.save(folder / f"tokens_{shard:05d}.npy", np.concatenate(arrays))
            arrays, shard, start = [], shard + 1, 0
        index.append((shard, start, len(tokens), prompt_len))
        arrays.append(np.asarray(tokens, dtype=np.int32))
        start += len(tokens)
    np.save(folder / f"tokens_{shard:05d}.npy", np.concatenate(arrays))
    np.save(folder / "index.npy", np.asarray(index, dtype=np.int64))


class Shards:
    """Read-only; a demonstration costs no memory until it is read."""

    def __init__(self, folder: Path) -> None:
        self.index = np.load(folder / "index.npy")
        self._tokens = [
            np.load(folder / f"tokens_{i:05d}.npy", mmap_mode="r") for i in range(int(self.index[-1, 0]) + 1)
        ]

    def __len__(self) -> int:
        return len(self.index)

    def length(self, i: int) -> int:
        return int(self.index[i, 2])

    def prompt_len(self, i: int) -> int:
        return int(self.index[i, 3])

    def tokens(self, i: int) -> np.ndarray:
        """int32 [length]."""
        shard, first, length, _ = self.index[i]
        return self._tokens[shard][first : first + length]
