"""The order in which a run sees its prompts."""

from __future__ import annotations

import random
from typing import Any

from megarl.errors import UserError


class PromptStream:
    """Endless indices into n prompts, each prompt once an epoch, in an order that depends on (seed, epoch) only.

    The state is therefore two small numbers, and a resumed stream goes on exactly where the saved one was.
    """

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True) -> None:
        if n < 1:
            raise ValueError("PromptStream needs at least one prompt")
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self.epoch, self.position = 0, 0
        self._order = self._order_of(0)

    def next(self, k: int) -> list[int]:
        """The next k indices; a batch may reach over the border of an epoch."""
        taken: list[int] = []
        while len(taken) < k:
            if self.position == self.n:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._order_of(self.epoch)
            part = self._order[self.position : self.position + k - len(taken)]
            self.position += len(part)
            taken += part
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "seed": self.seed, "shuffle": self.shuffle, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError if the state is of another file, seed or
        order: resuming would repeat or skip prompts without a word.
        """
        for key, here in (("n", self.n), ("seed", self.seed), ("shuffle", self.shuffle)):
            if state[key] != here:
                name = {"n": "the number of prompts", "seed": "run.seed", "shuffle": "data.shuffle"}[key]
                raise UserError(
                    f"{name} is {here}, but the checkpoint was written with {state[key]}; restore it or start in a "
                    "new run.dir"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(self.n))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
