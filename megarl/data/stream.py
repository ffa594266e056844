"""The order in which a run sees its prompts."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from megarl.errors import UserError

CONTENT = "content"  # key of a stream's state


def content_digest(path: str | Path) -> str:
    """Of a file's bytes, or of a folder's files with their names: what tells that the rows are the same ones."""
    root, digest = Path(path), xxhash.xxh3_128()
    for file in sorted(entry for entry in root.rglob("*") if entry.is_file()) if root.is_dir() else [root]:
        digest.update(file.relative_to(root).as_posix().encode() if file != root else b"")
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()


class PromptStream:
    """Endless indices into n prompts, each prompt once an epoch, in an order that depends on (seed, epoch) only.

    The state is therefore two small numbers, and those that were given back, which come first. A resumed stream goes on
    exactly where the saved one was. content: digest of the rows, kept in the state.
    """

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True, content: str = "") -> None:
        if n < 1:
            raise ValueError("PromptStream needs at least one prompt")
        self.n, self.seed, self.shuffle, self.content = n, seed, shuffle, content
        self.epoch, self.position = 0, 0
        self.returned: list[int] = []
        self._order = self._order_of(0)

    def next(self, k: int) -> list[int]:
        """The next k indices; a batch may reach over the border of an epoch."""
        taken, self.returned = self.returned[:k], self.returned[k:]
        while len(taken) < k:
            if self.position == self.n:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._order_of(self.epoch)
            part = self._order[self.position : self.position + k - len(taken)]
            self.position += len(part)
            taken += part
        return taken

    def give_back(self, indices: list[int]) -> None:
        """They were drawn and came to nothing: they are the next ones."""
        self.returned = indices + self.returned

    def state_dict(self, untrained: Sequence[int] = ()) -> dict[str, Any]:
        """untrained: indices that were drawn and have not been learnt from, which a resumed stream draws again."""
        returned = [*untrained, *self.returned]
        return {**self._identity(), "epoch": self.epoch, "position": self.position, "returned": returned}

    def load_state_dict(self, state: dict[str, Any], force: bool = False) -> None:
        """Goes on where `state` was. A state of other rows, another seed or order is refused by a UserError: resuming
        would repeat or skip prompts without a word. force: a new epoch of these rows begins instead.
        """
        self.epoch, self.position = state["epoch"], state["position"]
        self.returned = list(state.get("returned", []))  # a checkpoint of an earlier release has none
        for key, here in self._identity().items():
            if state.get(key, here) == here:
                continue
            if not force:
                names = {"n": "the number of prompts", "seed": "run.seed", "shuffle": "data.shuffle"}
                name = names.get(key, "the digest of data.prompts")
                raise UserError(
                    f"{name} is {here}, but the checkpoint was written with {state[key]}; restore it or start in a "
                    "new run.dir"
                )
            self.epoch, self.position, self.returned = state["epoch"] + 1, 0, []
        self._order = self._order_of(self.epoch)

    def _identity(self) -> dict[str, Any]:
        return {"n": self.n, "seed": self.seed, "shuffle": self.shuffle, CONTENT: self.content}

    def _order_of(self, epoch: int) -> array[int]:
        order = array("q", range(self.n))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
