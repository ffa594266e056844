"""When a run is saved: as run.save_every says, at its end, and where Ctrl-C or SIGTERM ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarl.config import Config
from megarl.engine.checkpoint import save_checkpoint
from megarl.engine.step import Engine
from megarl.errors import Stopped
from megarl.launch.stop import StopRequest
from megarl.observe.trace import phase


class Saver:
    """Every rank calls every method. ending: whether a signal ends the run after the last step that was done."""

    def __init__(self, config: Config, engine: Engine, critic: Engine | None) -> None:
        self.config, self.engine, self.critic = config, engine, critic
        self.stop = StopRequest(config.run.preempt_s)
        self.ending = False
        self._signum = 0
        self._unsaved: tuple[int, dict[str, Any]] | None = None  # the last step done, what to keep with it

    def due(self, step: int, state: dict[str, Any], *, last: bool) -> bool:
        """Whether to save now, after `step` steps. state: plain JSON of that moment, for a save() that may come later.
        last: the run ends here anyway. Collective.
        """
        # before the collective: what a rank does after it, writing the step's row for one, finds all ready to save
        self._unsaved, self.stop.unsaved = (step, state), True
        self._signum = self._asked_anywhere()
        every = self.config.run.save_every
        self.ending = bool(self._signum) and not last
        return self.ending or last or bool(every and step % every == 0)

    def save(self) -> None:
        """The last step that was done, unless it is saved. Collective."""
        if self._unsaved is None:
            return
        folder = Path(self.config.run.dir) / "checkpoints"
        with phase("checkpoint"):
            save_checkpoint(self.engine, folder, *self._unsaved, self.config.run.keep, self.critic)
        self._unsaved, self.stop.unsaved = None, False

    def interrupted(self, stopped: Stopped) -> None:
        """Saves, where the wait for the next step's rollouts was ended on every rank. Collective."""
        self._signum, self.ending = stopped.signum, True
        self.save()

    def end(self) -> None:
        """Stopped where a signal ended the run; after all else is closed."""
        if self.ending:
            raise Stopped(self._signum)

    def _asked_anywhere(self) -> int:
        asked = torch.tensor(self.stop.asked, device=self.engine.model.parallel.device.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return int(asked)
