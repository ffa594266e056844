"""Loggers besides metrics.jsonl: the real packages, offline or on a local file; a class
of the user's; one that fails.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import UserError
from megarl.observe.loggers import find_logger
from megarl.observe.metrics import MetricsLogger, read_metrics

SETTINGS = {"train": {"lr": 1e-4}, "objective": {"preset": "minirl"}}

CUSTOM = """
class Logger:
    def __init__(self, run_dir, settings, resumed_step):
        self.file = (run_dir / "custom.txt").open("a")
        self.file.write(f"{settings['train']['lr']} {resumed_step}\\n")
    def log(self, step, scalars):
        if step == 3:
            raise ConnectionError("server is away")
        self.file.write(f"{step} {scalars}\\n")
    def close(self):
        self.file.close()
"""


class Wrong:
    def __init__(self, run_dir: Path, settings: dict[str, Any], resumed_step: int, url: str) -> None: ...
    def log(self, step: int, scalars: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class Locked(Wrong):
    def __init__(self, run_dir: Path, settings: dict[str, Any], resumed_step: int) -> None:
        raise PermissionError("no account")


def test_fault_23_a_logger_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^run.loggers '.*Locked' could not start \(PermissionError: no account\)"):
        MetricsLogger(tmp_path, ["tests.unit.test_loggers.Locked"])


def two_sittings(folder: Path, name: str, apart_s: float = 0.0) -> None:
    """Steps 1 and 2, then a run resumed after step 1 that does 2 and 3."""
    for resumed, steps in ((0, (1, 2)), (1, (2, 3))):
        logger = MetricsLogger(folder, [name], resumed, SETTINGS)
        for step in steps:
            logger.log(
                step, {"reward/mean": step / 4, "routing/layer_agreement": [1.0, 0.5], "policy/entropy": float("nan")}
            )
        logger.close()
        time.sleep(apart_s)


def test_mlflow_keeps_one_run_in_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    two_sittings(tmp_path, "mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("megarl").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.lr"] == "0.0001"
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert sorted({(m.step, m.value) for m in history}) == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert set(run.data.metrics) == {"reward/mean", "routing/layer_agreement/0", "routing/layer_agreement/1"}


def test_wandb_writes_offline_without_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    two_sittings(
        tmp_path, "wandb", apart_s=1.0
    )  # W&B names a sitting's folder by the second; of two in one, the second may stay empty
    identity = (tmp_path / "wandb_run").read_text()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files and all(identity in file.name for file in files)
    assert all(b"reward/mean" in file.read_bytes() for file in files)


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of an offline run, sitting by sitting, as `wandb sync` would send them."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def leveldb_records(data: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """A .wandb file is LevelDB's log format after a header: pieces of (checksum 4, length 2, kind 1), none across a
    block's end; kinds 1 and 4 end a record.
    """
    at, record = header, b""
    while at + header <= len(data):
        if (left := block - at % block) < header:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):
            yield record
            record = b""


def test_fault_09_steps_done_again_after_a_resume_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By W&B, whose own step must rise over all sittings; TensorBoard forgets what was done again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("wandb", "tensorboard"):
        two_sittings(tmp_path, name, apart_s=1.0)
    rows = wandb_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 2, 3] and [row["_step"] for row in rows] == [1, 2, 3, 4]
    assert [row["reward/mean"] for row in rows] == [0.25, 0.5, 0.5, 0.75]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("reward/mean")] == [1, 2, 3]


def test_a_class_of_the_users_and_its_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "my_tracking.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    two_sittings(tmp_path / "run", "my_tracking.Logger")
    text = (tmp_path / "run" / "custom.txt").read_text().splitlines()
    assert text[0] == "0.0001 0" and text[3] == "0.0001 1" and text[-1].startswith("2 {'reward/mean': 0.5, ")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
    told = capsys.readouterr().err
    assert (
        "run.loggers 'my_tracking.Logger' failed at step 3 and is off from here: ConnectionError: server is away"
        in told
    )
    sys.modules.pop("my_tracking")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "unknown; did you mean 'wandb'?"),
        ("carbon", "unknown; choose one of tensorboard, wandb, mlflow"),
        ("nowhere.Logger", "importing 'nowhere' failed (ModuleNotFoundError"),
        ("json.Logger", "module 'json' has no class 'Logger'"),
    ],
)
def test_a_logger_that_is_not_there_is_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        find_logger(name)
    assert (
        message in str(error.value)
        and str(error.value).startswith(f"run.loggers {name!r}")
        and "\n" not in str(error.value)
    )


def test_a_package_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package mlflow, .* pip install 'megarl\[loggers\]'"):
        find_logger("mlflow")
