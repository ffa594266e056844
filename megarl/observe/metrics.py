"""metrics.jsonl: one JSON object a step, under the names of docs/objective.md; the same scalars for other loggers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.folders import write_whole
from megarl.observe.loggers import make_logger

METRICS_FILE = "metrics.jsonl"
Value = float | int | Sequence[float]


class MetricsLogger:
    """Appends rows to run_dir/metrics.jsonl and hands their scalars to `loggers` (names of megarl.observe.loggers).

    `resumed_step` is the last step of the checkpoint the run goes on from (0 for a new run): rows after it, and a row
    that a crash left half written, are removed, for those steps will be done again. `settings` is the resolved
    configuration, for loggers that keep it.
    """

    def __init__(
        self,
        run_dir: str | Path,
        loggers: Sequence[str] = (),
        resumed_step: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_until(resumed_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._loggers = {name: make_logger(name, self.path.parent, settings or {}, resumed_step) for name in loggers}

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """One row. A value is a number or a list of numbers (one a MoE layer); what is
        not finite is written as null.
        """
        row = {"step": step, **_plain_row(metrics)}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._pass_on(step, row)

    def amend(self, step: int, metrics: Mapping[str, Value]) -> dict[str, Any]:
        """More of the last row, which is `step`'s; returns it all. The file is replaced: it holds one row a step."""
        more = _plain_row(metrics)
        row = {**read_metrics(self.path.parent)[-1], **more}
        if row["step"] != step:
            raise ValueError(f"the last row of {self.path} is of step {row['step']}, not {step}")
        self._file.close()
        self._replace([*read_metrics(self.path.parent)[:-1], row])
        self._file = self.path.open("a", encoding="utf-8")
        self._pass_on(step, more)
        return row

    def _pass_on(self, step: int, row: Mapping[str, Any]) -> None:
        scalars = dict(pair for key, value in row.items() for pair in _scalars(key, value))
        for name, logger in list(self._loggers.items()):
            try:
                logger.log(step, scalars)
            except (
                Exception
            ) as error:  # a tracking server that is away must not end a run whose rows are safe in metrics.jsonl
                print(
                    f"run.loggers {name!r} failed at step {step} and is off from here: {type(error).__name__}: {error}",
                    file=sys.stderr,
                )
                del self._loggers[name]

    def close(self) -> None:
        self._file.close()
        for logger in self._loggers.values():
            logger.close()

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        self._replace([row for row in read_metrics(self.path.parent) if row["step"] <= step])

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of run_dir/metrics.jsonl in order of step. FileNotFoundError if there is no file."""
    return read_rows(Path(run_dir) / METRICS_FILE)


def last_step(run_dir: str | Path) -> int:
    """Of the last row; 0 where there is none."""
    path = Path(run_dir) / METRICS_FILE
    rows = read_rows(path) if path.is_file() else []
    return int(rows[-1]["step"]) if rows else 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines that hold a `step`, in its order; the last line of a step counts.

    What a crash or another program left between them is passed over: a line cut short, bytes that are no UTF-8.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text("utf-8", errors="replace").split("\n"):  # not splitlines: a text may hold U+2028
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _plain_row(metrics: Mapping[str, Value]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in metrics.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


def _scalars(key: str, value: Any) -> list[tuple[str, float]]:
    values = [(f"{key}/{i}", v) for i, v in enumerate(value)] if isinstance(value, list) else [(key, value)]
    return [(name, number) for name, number in values if number is not None and key != "step"]
