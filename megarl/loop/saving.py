"""When a run is saved: as run.save_every says, at its end, and where Ctrl-C or SIGTERM ends it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarl.config import Config
from megarl.engine.background import Background
from megarl.engine.checkpoint import begin_checkpoint
from megarl.engine.step import Engine
from megarl.errors import Stopped
from megarl.launch.stop import StopRequest
from megarl.observe.trace import phase

END_S = 20.0  # how long a run that ends by an error waits for a checkpoint that is being written


class Saver:
    """Every rank calls every method. ending: whether a signal ends the run after the last step that was done.

    A checkpoint is written while the run goes on; one that is not yet whole is waited for before the next begins, and
    where the run ends.
    """

    def __init__(self, config: Config, engine: Engine, critic: Engine | None) -> None:
        self.config, self.engine, self.critic = config, engine, critic
        self.stop = StopRequest(config.run.preempt_s, self._at_risk)
        self.ending = False
        self._signum = 0
        self._unsaved: tuple[int, dict[str, Any]] | None = None  # the last step done, what to keep with it
        self._writing: Background | None = None
        self._saved_at = time.monotonic()

    def due(self, step: int, state: dict[str, Any], *, last: bool) -> bool:
        """Whether to save now, after `step` steps. state: plain JSON of that moment, for a save() that may come later.
        last: the run ends here anyway. UserError where the last save failed. Collective.
        """
        # before the collective: what a rank does after it, writing the step's row for one, finds all ready to save
        self._unsaved = step, state
        self._signum, late, failed = self._on_any_rank()
        if failed:
            self.finish()
        every = self.config.run.save_every
        self.ending = bool(self._signum) and not last
        return self.ending or last or late or bool(every and step % every == 0)

    def save(self) -> None:
        """Begins to save the last step that was done, unless it is saved. Collective."""
        if self._unsaved is None:
            return
        self.finish()
        folder = Path(self.config.run.dir) / "checkpoints"
        with phase("checkpoint"):
            self._writing = begin_checkpoint(self.engine, folder, *self._unsaved, self.config.run.keep, self.critic)
        self._unsaved, self._saved_at = None, time.monotonic()

    def finish(self) -> None:
        """Waits until what was begun is whole. UserError, on every rank, where it cannot be written. Collective."""
        if self._writing is not None:
            with phase("checkpoint_end", self._writing.within_s):
                self._writing.finish()
            self._writing = None

    def interrupted(self, stopped: Stopped) -> None:
        """Saves, where the wait for the next step's rollouts was ended on every rank. Collective."""
        self._signum, self.ending = stopped.signum, True
        self.save()
        self.finish()

    def end(self) -> None:
        """Stopped where a signal ended the run; after all else is closed."""
        if self.ending:
            raise Stopped(self._signum)

    def close(self) -> None:
        """However the run ends: what was begun is whole by then, unless that takes too long. Signals are as before."""
        if self._writing is not None:
            self._writing.wait(END_S)
        self.stop.close()

    def _at_risk(self) -> bool:
        return self._unsaved is not None or (self._writing is not None and self._writing.running)

    def _on_any_rank(self) -> tuple[int, bool, bool]:
        """The signal that came, or 0; whether run.save_every_minutes are over, by rank 0's clock; whether the save that
        was begun has failed.
        """
        minutes = self.config.run.save_every_minutes
        late = dist.get_rank() == 0 and 0 < minutes * 60 <= time.monotonic() - self._saved_at
        failed = self._writing is not None and self._writing.failed
        flags = torch.tensor([self.stop.asked, late, failed], device=self.engine.model.parallel.device.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        asked, late, failed = flags.tolist()
        return asked, bool(late), bool(failed)
