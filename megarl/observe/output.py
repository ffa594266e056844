"""All that a run shows, on rank 0: metrics.jsonl, loggers, rollouts/, config.yaml, the live line and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megarl.config import Config, keep_config
from megarl.observe.metrics import MetricsLogger
from megarl.observe.progress import Progress
from megarl.observe.samples import Sample, write_samples
from megarl.observe.token_samples import write_token_samples
from megarl.observe.trace import start_trace, stop_trace
from megarl.observe.worst import TokenNotes, write_worst


class Page(Protocol):
    """What is made of all that is written, while the run goes on and at its end (megarl.report.live)."""

    def refresh(self) -> None: ...

    def close(self) -> None: ...


class Output:
    """resumed: the step of the checkpoint that the run goes on from; 0 at its beginning."""

    def __init__(self, config: Config, resumed: int, tokenizer: Any, page: Page) -> None:
        self.tokenizer = tokenizer
        self.page = page
        self.dir = Path(config.run.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        keep_config(config, self.dir, resumed)
        self.logger = MetricsLogger(self.dir, config.run.loggers, resumed, config.model_dump(mode="json"))
        start_trace(self.dir)
        self.progress = Progress(config.train.steps)
        if resumed:
            print(f"resuming after step {resumed}")

    def write(
        self, step: int, metrics: dict[str, float | list[float]], samples: list[Sample], notes: TokenNotes
    ) -> None:
        """One step: its metrics, some responses to read, the tokens on which the engines differ most."""
        decode = self.tokenizer.decode
        self.logger.log(step, metrics)
        self.progress.update(step, metrics)
        if samples:
            write_samples(self.dir, step, samples, decode)
            write_token_samples(self.dir, step, samples, notes.sampled, decode)
        if notes.worst:
            write_worst(self.dir, step, notes.worst, decode)
        self.page.refresh()

    def evaluated(self, step: int, metrics: dict[str, float | list[float]]) -> None:
        """What an evaluation after `step` adds to its row, which has been written."""
        self.progress.update(step, self.logger.amend(step, metrics))
        self.page.refresh()

    def close(self) -> None:
        self.logger.close()
        self.progress.close()
        stop_trace()
        self.page.close()
