"""A run's checkpoints on one rank: what is the configuration's, a full disk, files that are not what was written.

Between layouts: tests/parallel/test_resume.py.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import resource
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megarl import refusals
from megarl.checkpoints import damage, newest, state_of, whole_checkpoints
from megarl.config import load_config
from megarl.convert.commands import megatron_to_hf_main
from megarl.engine.build import Engine, build_engine
from megarl.errors import UserError
from megarl.observe.trace import entered
from megarl.rollout.patience import checkpoint_s, resuming_s
from megarl.weights.files.torch_dist import TorchDistReader, foreign_names_refused
from tools.bench.gpu.common import packs_of
from tools.bench.gpu.correctness import _loss
from tools.tiny_model import make_tiny_model

# isort: split
from megarl.engine import checkpoint
from megarl.engine.adam_state import parts_of
from megarl.engine.background import Parts
from megarl.engine.checkpoint import begin_checkpoint, load_checkpoint, save_checkpoint
from megarl.loop.resume import agree, resume

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("checkpoints") / "model", layers=1)


def engine_of(model: Path, *settings: str) -> Engine:
    return build_engine(load_config(None, [f"model.path={model}", "train.lr=1e-2", *settings]), optimizer_steps=4)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return engine_of(model)


@pytest.fixture
def run_dir(engine: Engine, tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    for step in (2, 4):
        save_checkpoint(engine, tmp_path / "checkpoints", step, {"optimizer_steps": step}, keep=2)
    return tmp_path


@pytest.mark.parametrize("distributed", [False, True])
def test_before_the_first_step_it_is_saved_and_the_run_goes_on_from_it(
    model: Path, tmp_path: Path, distributed: bool
) -> None:
    """As of a run whose first batches taught nothing."""
    one = engine_of(model, f"engine.distributed_optimizer={distributed}")
    whole = save_checkpoint(one, tmp_path, 2, {"optimizer_steps": 0}, keep=1)
    again = engine_of(model, f"engine.distributed_optimizer={distributed}")
    assert load_checkpoint(again, whole)["optimizer_steps"] == 0
    for each in (one, again):
        each.update(packs_of(each, 64, 32), "off", _loss)
        each.update(packs_of(each, 64, 32), "off", _loss)
    for (param, want), (_, got) in zip(one.model.params(), again.model.params(), strict=True):
        assert torch.equal(got, want), param.name


def test_fault_05_what_the_configuration_names_is_the_configurations(model: Path, tmp_path: Path) -> None:
    one = engine_of(model)
    one.update(packs_of(one, 64, 32), "off", _loss)
    whole = save_checkpoint(one, tmp_path, 1, {"optimizer_steps": 1}, keep=1)
    settings = "train.lr=1e-5 train.min_lr=1e-6 train.adam_beta1=0.8 train.adam_eps=1e-6 train.weight_decay=0.1"
    again = engine_of(model, *settings.split())
    load_checkpoint(again, whole)
    for part in parts_of(again.optimizer):
        for group in part.optimizer.param_groups:
            assert (group["lr"], group["min_lr"], group["betas"], group["eps"]) == (1e-5, 1e-6, (0.8, 0.999), 1e-6)
            assert all(float(part.optimizer.state[tensor]["step"]) == 1 for tensor in group["params"])
    assert again.update(packs_of(again, 64, 32), "off", _loss)[1]["optim/lr"] == 1e-5


def test_a_checkpoint_that_is_written_while_the_run_goes_on_is_that_of_its_moment(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, go = engine_of(model), threading.Event()
    engine.update(packs_of(engine, 64, 32), "off", _loss)
    want = save_checkpoint(engine, tmp_path / "a", 1, {}, keep=1)
    write = Parts.write
    monkeypatch.setattr(Parts, "write", lambda parts: go.wait(60) and write(parts))
    writing = begin_checkpoint(engine, tmp_path / "b", 1, {}, keep=1)
    engine.update(packs_of(engine, 64, 32), "off", _loss)
    assert writing.running and not whole_checkpoints(tmp_path / "b")
    go.set()
    writing.finish()
    (got,) = whole_checkpoints(tmp_path / "b")
    tensors = [
        {name: is_ for name, is_ in state_of(path)["files"].items() if ".distcp" in name} for path in (want, got)
    ]
    assert tensors[0] == tensors[1] and len(tensors[0]) == 2
    written = sum(path.stat().st_size for path in got.glob("*.distcp"))
    assert writing.within_s == pytest.approx(checkpoint_s(written), rel=0.2)
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())


def test_fault_12_a_checkpoint_that_a_rank_does_not_see_is_not_taken_for_a_damaged_one(
    engine: Engine, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megarl.loop.resume.SEEN_WITHIN_S", 0.0)
    monkeypatch.setattr("os.listdir", lambda folder: ["step_2"])
    with pytest.raises(UserError, match=r"same folder for all ranks: rank 0 \(host .*\) does not see step_4"):
        agree(run_dir / "checkpoints")
    assert [path.name for path in whole_checkpoints(run_dir / "checkpoints")] == ["step_2", "step_4"]


def test_fault_12_a_run_dir_that_a_rank_does_not_share_is_refused_before_the_first_step(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any layout: under PP2 without a shared folder each host would keep half of the model."""
    run_dir = tmp_path / "new" / "run"
    assert resume(run_dir, engine) is None and list(run_dir.iterdir()) == []
    monkeypatch.setattr("megarl.loop.resume.SEEN_WITHIN_S", 0.0)
    monkeypatch.setattr("megarl.loop.resume._lists", lambda folder, name: False)
    with pytest.raises(
        UserError, match=r"run' is not the same folder for all ranks: rank 0 \(host .*does not see .seen"
    ):
        resume(run_dir, engine)
    assert list(run_dir.iterdir()) == []


def test_fault_12_a_part_that_rank_0_does_not_see_makes_no_checkpoint(
    engine: Engine, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a folder that hosts do not share."""
    monkeypatch.setattr(checkpoint, "SEEN_WITHIN_S", 0.0)
    monkeypatch.setattr(checkpoint, "_sealed_file", lambda path: (path.unlink(), [1, "0"])[1])
    with pytest.raises(UserError, match=r"rank 0 does not see __0_\d.distcp of rank 0: run.dir must be one"):
        save_checkpoint(engine, run_dir / "checkpoints", 6, {}, keep=2)
    assert [path.name for path in whole_checkpoints(run_dir / "checkpoints")] == ["step_2", "step_4"]


def test_fault_16_a_disk_that_is_full_is_one_line_and_leaves_nothing(engine: Engine, run_dir: Path) -> None:
    """A limit on the size of a file stops the real writers as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"step_6' cannot be written \(.*; \d+ MiB are free there now: make room"):
            save_checkpoint(engine, run_dir / "checkpoints", 6, {"optimizer_steps": 6}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_2", "step_4"]
    assert agree(run_dir / "checkpoints") == run_dir / "checkpoints" / "step_4"


def test_fault_16_a_save_and_a_start_remove_what_a_crash_left_and_nothing_else(engine: Engine, run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    others = [folder / name for name in ("notes", ".step_x.partial", "step_2.copy", "best_step_2")]
    for start in (True, False):
        for path in [*others, folder / ".step_9.partial"]:
            path.mkdir(exist_ok=True)
        if start:
            agree(folder)
        else:
            save_checkpoint(engine, folder, 6, {"optimizer_steps": 6}, keep=2)
        assert not (folder / ".step_9.partial").exists() and all(path.is_dir() for path in others)


def test_an_old_checkpoint_that_is_open_elsewhere_ends_no_save(
    engine: Engine, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system keeps its open files: ENOTEMPTY. What is left is no checkpoint, and goes at the next."""
    folder = run_dir / "checkpoints"

    def not_empty(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", not_empty)
        save_checkpoint(engine, folder, 6, {"optimizer_steps": 6}, keep=2)
    assert [path.name for path in whole_checkpoints(folder)] == ["step_4", "step_6"]
    assert (folder / ".step_2.partial").is_dir()
    save_checkpoint(engine, folder, 8, {"optimizer_steps": 8}, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step_6", "step_8"]


def flip(path: Path) -> None:
    """One bit, in the middle of a tensor."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "__0_0.distcp has 100 bytes of "),
        (lambda path: path.write_bytes(b""), "__0_0.distcp has 0 bytes of "),
        (lambda path: path.unlink(), "__0_0.distcp is missing"),
        (flip, "the checksum of __0_0.distcp is another"),
        (lambda path: (path.parent / "megarl.json").write_text('{"step'), "megarl.json cannot be read"),
        (lambda path: (path.parent / "hf" / "config.json").unlink(), "hf/config.json is missing"),
    ],
)
def test_fault_12_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    engine: Engine, run_dir: Path, capsys: pytest.CaptureFixture[str], harm, said: str
) -> None:
    last = run_dir / "checkpoints" / "step_4"
    harm(last / "__0_0.distcp")
    assert (newest(run_dir / "checkpoints") == last) == (harm is flip)  # sizes alone do not show a flipped bit
    state = resume(run_dir, engine)
    assert state is not None and state["step"] == 2
    out = capsys.readouterr().out
    assert f"{str(last)!r} is damaged ({said}" in out and out.count("\n") == 1 and "going on from step_2" in out
    assert [path.name for path in whole_checkpoints(run_dir / "checkpoints")] == ["step_2"]
    flip(run_dir / "checkpoints" / "step_2" / "__0_1.distcp")
    with pytest.raises(UserError, match=r"step_2' is damaged \(.*\), and there is no whole one before it"):
        resume(run_dir, engine)


def test_a_resume_is_no_stall_while_its_bytes_may_take_it(
    engine: Engine, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float]] = []
    monkeypatch.setattr("megarl.loop.resume.damage_on_any_rank", lambda path, hosts: seen.append(entered()[::2]))
    assert resume(run_dir, engine) is not None
    within_s = resuming_s(run_dir / "checkpoints" / "step_4", ranks=1)
    assert within_s > 0 and seen == [("the checksums of step_4", within_s)]
    assert entered()[::2] == ("the load of step_4", within_s)


def test_fault_12_a_flipped_bit_in_a_model_path_and_in_a_conversion_is_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "checkpoints" / "step_4"
    flip(path / "__0_0.distcp")
    said = r"step_4' is damaged \(the checksum of __0_0.distcp is another\)"
    with pytest.raises(UserError, match=said):
        engine_of(path)
    assert megatron_to_hf_main(["--megatron", str(path), "--out", str(tmp_path / "hf")]) == 2
    assert re.search(said, capsys.readouterr().err)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"step_4' is damaged \(__0_0.distcp is missing\)"):
        refusals.check(load_config(None, [f"model.path={path}"]), "score")


def test_fault_12_what_torch_says_of_a_checkpoint_is_one_line(engine: Engine, model: Path, run_dir: Path) -> None:
    """Its CheckpointException is no Exception. A checkpoint without checksums, and one of another optimizer."""
    cut = run_dir / "checkpoints" / "step_4"
    state = json.loads((cut / "megarl.json").read_text())
    del state["files"]
    (cut / "megarl.json").write_text(json.dumps(state))
    assert damage(cut, contents=True) is None
    shutil.copyfile(cut / "megarl.json", cut / "__0_0.distcp")
    with pytest.raises(UserError, match=r"step_4' cannot be loaded \([^\n]*__0_0.distcp"):
        load_checkpoint(engine, cut)
    bfloat16 = engine_of(model, "engine.dtype=bfloat16")
    with pytest.raises(UserError, match=r"step_2' cannot be loaded \([^\n]*optimizer.state.fp32_param"):
        load_checkpoint(bfloat16, run_dir / "checkpoints" / "step_2")


class Runs:
    """Pickled, a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def changes_a_class(module: str, name: str, state: bytes) -> bytes:
    """A pickle whose second value, BUILD's, becomes attributes of a class."""
    return b"c" + f"{module}\n{name}\n".encode() + b"(N" + state + b"tb"


@pytest.fixture
def unsealed(run_dir: Path) -> Path:
    """A checkpoint without the checksums, which whoever plants something in it can write too."""
    path = run_dir / "checkpoints" / "step_4"
    state = json.loads((path / "megarl.json").read_text())
    del state["files"]
    (path / "megarl.json").write_text(json.dumps(state))
    return path


def plant(path: Path, key: str, **entries: Any) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata = {key: BytesStorageMetadata(), **metadata.state_dict_metadata}
    first = {MetadataIndex(name): place for name, place in entries.items()}
    metadata.storage_data = {**first, **metadata.storage_data}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_resume_makes_nothing_that_metadata_names(engine: Engine, unsealed: Path, tmp_path: Path) -> None:
    """Nor does it change a class, by which a second look would see something else than the first."""
    ran, whole = tmp_path / "ran", (unsealed / ".metadata").read_bytes()
    metadata = pickle.loads(whole)
    metadata.state_dict_metadata["planted"] = Runs(ran)
    torch_checkpoint = "torch.distributed.checkpoint"
    attributes = b"}S'a'\nS'b'\ns"
    renamed = changes_a_class(f"{torch_checkpoint}.metadata", "BytesStorageMetadata", attributes)
    moved = changes_a_class(f"{torch_checkpoint}.filesystem", "_StorageInfo", attributes)
    for content, said in (
        (pickle.dumps(metadata), r"it names \w+\.system"),
        (renamed + b"0" + whole, r"\w+\.__setstate__"),
        (whole[:-1] + moved + b"0.", r"\w+\.__setstate__"),
        (changes_a_class("torch", "Size", attributes) + b"0" + whole, "cannot set|.*immutable"),
        (whole[: len(whole) // 2], r"\w"),
    ):
        (unsealed / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=rf"step_4' cannot be loaded \(\.metadata cannot be read: {said}"):
            load_checkpoint(engine, unsealed)
    assert not ran.exists()


@pytest.mark.parametrize(
    "case", ["alone", "after one without a place", "after one without a file", "after a TypeError"]
)
def test_a_resume_runs_no_bytes_of_an_entry_without_a_tensor(
    engine: Engine, unsealed: Path, tmp_path: Path, case: str
) -> None:
    """torch unpickles them whatever they name, for any key that is asked for and that .metadata gives as bytes."""
    ran = tmp_path / "ran"
    key = next(iter(TorchDistReader(unsealed).tensors))
    odd = OrderedDict(a=1)
    odd.__dict__["b"] = 1  # weights_only's reader fails on such a thing otherwise than on a name
    torch.save([odd, Runs(ran)] if case == "after a TypeError" else Runs(ran), unsealed / "planted.distcp")
    place = _StorageInfo("planted.distcp", 0, (unsealed / "planted.distcp").stat().st_size)
    before: dict[str, Any] = {
        "after one without a place": {"zzz": place},
        "after one without a file": {"zzz": _StorageInfo("gone.distcp", 0, 5)},
    }.get(case, {})
    plant(unsealed, key, **before, **{key: place})
    metadata = pickle.loads((unsealed / ".metadata").read_bytes())
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    (unsealed / ".metadata").write_bytes(pickle.dumps(metadata))
    with foreign_names_refused(unsealed), pytest.raises(CheckpointException, match="(?i)weights.?only|TypeError"):
        torch.distributed.checkpoint.load(
            {key: io.BytesIO()},
            checkpoint_id=unsealed,
            planner=DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=True,
        )
    with pytest.raises(UserError, match="step_4' cannot be loaded"):
        load_checkpoint(engine, unsealed)
    assert not ran.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
