"""Where scalars go besides metrics.jsonl: TensorBoard, Weights &
Biases, MLflow, or a class of the user's by dotted path.

A logger is made on rank 0 as Class(run_dir, settings, resumed_step) and called as in `Logger`. A resumed run goes on in
the same W&B and MLflow run, whose identity the run folder keeps.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megarl.dotted import import_dotted
from megarl.errors import UserError

Scalars = Mapping[str, float]
FLUSH_S = 10  # how often TensorBoard's own thread writes what it has: as much a run that is killed may lose of it


class Logger(Protocol):
    """settings: the resolved configuration as a plain tree. resumed_step:
    last step of the checkpoint the run goes on from, or 0.
    """

    def __init__(self, run_dir: Path, settings: dict[str, Any], resumed_step: int) -> None: ...

    def log(self, step: int, scalars: Scalars) -> None:
        """All finite scalars of one step, under the names of docs/objective.md; lists come as name/0, name/1, ..."""

    def close(self) -> None: ...


class TensorBoard:
    """run_dir/tensorboard."""

    def __init__(self, run_dir: Path, settings: dict[str, Any], resumed_step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter  # over a second to import

        self._summary = Summary
        self._board: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1, flush_secs=FLUSH_S)

    def log(self, step: int, scalars: Scalars) -> None:
        """One record, whatever the number of scalars: the writer's queue takes ten, then it keeps the step waiting."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._board.file_writer.add_summary(self._summary(value=values), step)

    def close(self) -> None:
        self._board.close()


class Wandb:
    """W&B by its own environment variables. Without WANDB_MODE and
    WANDB_API_KEY it writes offline, to run_dir/wandb, for `wandb sync`.

    W&B drops a row whose step is not above all before it, and a resumed run does steps again. So its own step counts
    rows, over all sittings, and `step` is the axis of every chart.
    """

    def __init__(self, run_dir: Path, settings: dict[str, Any], resumed_step: int) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megarl"),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=_identity(run_dir / "wandb_run", uuid.uuid4().hex[:12]),
            resume="allow",
            dir=run_dir,
            mode=mode,
            config=settings,
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._rows = run_dir / "wandb_rows"

    def log(self, step: int, scalars: Scalars) -> None:
        row = 1 + int(self._rows.read_text(encoding="utf-8") if self._rows.is_file() else 0)
        self._rows.write_text(
            str(row), encoding="utf-8"
        )  # before the row: one that a crash lost is no harm, one used twice is dropped
        self._run.log({"step": step, **scalars}, step=row)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow at MLFLOW_TRACKING_URI, else in the file run_dir/mlflow.db
    (`mlflow ui --backend-store-uri sqlite:///...` shows it).
    """

    def __init__(self, run_dir: Path, settings: dict[str, Any], resumed_step: int) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.resolve() / 'mlflow.db'}"
        )
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megarl")
        experiment = self._client.get_experiment_by_name(name)
        known = run_dir / "mlflow_run"
        if known.is_file():
            self._run = known.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        identity = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = _identity(known, self._client.create_run(identity, run_name=run_dir.name).info.run_id)
        self._client.log_batch(self._run, params=[Param(key, str(value)) for key, value in _flat(settings)])

    def log(self, step: int, scalars: Scalars) -> None:
        # MLflow wants milliseconds; the step is the axis that counts, and a resumed run shall give the same file
        now = 0
        self._client.log_batch(
            self._run, metrics=[self._metric(name, value, now, step) for name, value in scalars.items()]
        )

    def close(self) -> None:
        self._client.set_terminated(self._run)


BUILT_IN: dict[str, tuple[type[Logger], str]] = {  # name -> class, the package it needs
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (Wandb, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}


def find_logger(name: str) -> Callable[..., Logger]:
    """A built-in logger, or the class at the dotted path
    `package.module.Class` (modules of the working directory are found).

    Raises UserError, one line, for a name that is neither, for a class that could not be used as a `Logger`, and for
    a package that is not installed; imports nothing of a built-in one.
    """
    if name in BUILT_IN:
        kind, package = BUILT_IN[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"run.loggers {name!r} needs the package {package}, which is not installed; pip install "
                "'megarl[loggers]'"
            )
        return kind
    logger_class = import_dotted("run.loggers", name, "class", BUILT_IN)
    wrong = " and ".join(method for method in ("log", "close") if not callable(getattr(logger_class, method, None)))
    wrong = wrong and f"has no {wrong}"
    try:
        inspect.signature(logger_class).bind(Path(), {}, 0)
    except (TypeError, ValueError) as error:
        wrong = wrong or f"cannot be made so: {error}"
    if wrong:
        raise UserError(
            f"run.loggers {name!r} {wrong}; a logger is made as Class(run_dir, settings, resumed_step) and has "
            "log(step, scalars) and close()"
        )
    return logger_class


def make_logger(name: str, run_dir: Path, settings: dict[str, Any], resumed_step: int) -> Logger:
    """The logger `name`. UserError, one line, where it cannot be made: its server may want an account."""
    kind = find_logger(name)
    try:
        return kind(run_dir, settings, resumed_step)
    except Exception as error:  # whatever a package or a class of the user's raises
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"run.loggers {name!r} could not start ({why}); mend it, or leave it out") from error


def _identity(file: Path, fresh: str) -> str:
    """What `file` holds, so that a resumed run is the same run; a new run writes `fresh` there."""
    if not file.is_file():
        file.write_text(fresh, encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        leaf
        for key, value in tree.items()
        for leaf in (_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)])
    ]
