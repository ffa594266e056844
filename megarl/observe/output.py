"""All that a run shows, on rank 0: metrics.jsonl, loggers, rollouts/, config.yaml and the live line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.config import Config, dump_config
from megarl.observe.metrics import MetricsLogger
from megarl.observe.progress import Progress
from megarl.observe.samples import Sample, write_samples
from megarl.observe.trace import start_trace, stop_trace
from megarl.observe.worst import Row, write_worst


class Output:
    """resumed: the step of the checkpoint that the run goes on from; 0 at its beginning."""

    def __init__(self, config: Config, resumed: int, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.dir = Path(config.run.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "config.yaml").write_text(dump_config(config), "utf-8")
        self.logger = MetricsLogger(self.dir, config.run.loggers, resumed, config.model_dump(mode="json"))
        start_trace(self.dir)
        self.progress = Progress(config.train.steps)
        if resumed:
            print(f"resuming after step {resumed}")

    def write(
        self, step: int, metrics: dict[str, float | list[float]], samples: list[Sample], worst: list[Row]
    ) -> None:
        """One step: its metrics, some responses to read, the tokens on which the engines differ most."""
        self.logger.log(step, metrics)
        self.progress.update(step, metrics)
        if samples:
            write_samples(self.dir, step, samples, self.tokenizer.decode)
        if worst:
            write_worst(self.dir, step, worst, self.tokenizer.decode)

    def close(self) -> None:
        self.logger.close()
        self.progress.close()
        stop_trace()
