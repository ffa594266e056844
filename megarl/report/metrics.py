"""metrics.jsonl: one JSON object a step, under the names of spec/objective.md; the same scalars for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
Value = float | int | Sequence[float]


class MetricsLogger:
    """Appends rows to run_dir/metrics.jsonl and, if `tensorboard`, to run_dir/tensorboard.

    `resumed_step` is the last step of the checkpoint the run goes on from (0 for a new run): rows after it, and a row that a crash left
    half written, are removed, for those steps will be done again.
    """

    def __init__(self, run_dir: str | Path, tensorboard: bool = True, resumed_step: int = 0) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_until(resumed_step)
        self._file = self.path.open("a")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # over a second to import

            self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=resumed_step + 1)

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """One row. A value is a number or a list of numbers (one a MoE layer); what is not finite is written as null."""
        row = {"step": step, **{key: _plain(value) for key, value in metrics.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                for name, number in _scalars(key, value):
                    self._board.add_scalar(name, number, step)
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        rows = [row for row in read_metrics(self.path.parent) if row["step"] <= step]
        whole = self.path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(whole, self.path)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of run_dir/metrics.jsonl in order of step, without a line that a crash cut short. FileNotFoundError if there is no file."""
    rows: dict[int, dict[str, Any]] = {}
    for line in (Path(run_dir) / METRICS_FILE).read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


def _scalars(key: str, value: Any) -> list[tuple[str, float]]:
    values = [(f"{key}/{i}", v) for i, v in enumerate(value)] if isinstance(value, list) else [(key, value)]
    return [(name, number) for name, number in values if number is not None and key != "step"]
