"""Conversion between Hugging Face folders and Megatron checkpoints: bit for bit, resumed, and refused in one line."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as meta
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megarl.convert import commands, to_hf, to_megatron
from megarl.errors import UserError
from megarl.weights.files.disk_file import DiskFile
from megarl.weights.files.hf_folder import ShardFile
from megarl.weights.files.raw_file import RawFile, Spec, bytes_of
from megarl.weights.files.safetensors_file import SafetensorsWriter
from megarl.weights.files.tensors import bits_of, tensor_of
from megarl.weights.files.torch_archive import elements_of, write_tensor
from megarl.weights.files.torch_dist import TorchDistReader, TorchDistWriter
from megarl.weights.files.torch_pickles import STORAGE, metadata_pickle
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.rect import Rect

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.tiny_model import FAMILIES, tiny_config  # noqa: E402

DENSE = ("qwen3", "qwen3_tied", "llama")
LAYOUTS = ("", "--tp 2", "--pp 2 --vpp 2", "--pp 4", "--tp 2 --pp 2", "--tp 4 --pp 2 --vpp 2")
EXPERTS = ("--ep 8", "--tp 2 --etp 2", "--tp 2 --pp 2 --ep 2", "--tp 4 --etp 2 --ep 4 --pp 2 --vpp 2")
SHARD = "--shard-gib 0.00003"  # 31 KiB: several files of a model of some 200 KB


def make_folder(out: Path, family: str, **sizes: Any) -> Path:
    """A Hugging Face folder of random bits in bf16 (float32 where the
    family keeps it), config.json and a stand-in for the tokenizer.
    """
    defaults: dict[str, Any] = dict(hidden=32, heads=4, kv_heads=4, head_dim=16, moe_intermediate=16, vocab_size=37)
    tree = tiny_config(family, **(defaults | sizes)).to_dict() | {"dtype": "bfloat16"}
    weight_map = WeightMap(tree)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in weight_map.hf_shapes.items():
        dtype = torch.float32 if name in weight_map.hf_float32 else torch.bfloat16
        bits = torch.randint(
            0, 256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8, generator=generator
        )  # NaN among them
        tensors[name] = bits.view(dtype).view(shape)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(tree))
    (out / "tokenizer.json").write_text("{}")
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("convert") / "hf", "qwen3_moe")


def to_megatron_(hf: Path, out: Path, options: str = "") -> int:
    return commands.hf_to_megatron_main(["--hf", str(hf), "--out", str(out), *options.split()])


def to_hf_(megatron: Path, out: Path, options: str = "") -> int:
    return commands.megatron_to_hf_main(["--megatron", str(megatron), "--out", str(out), *options.split()])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(a: Path, b: Path) -> None:
    want, found = tensors_of(a), tensors_of(b)
    assert want.keys() == found.keys()
    for name in want:
        assert want[name].dtype == found[name].dtype and want[name].shape == found[name].shape, name
        assert torch.equal(want[name].view(-1).view(torch.uint8), found[name].view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bitwise_equal_in_every_layout(family: str, tmp_path: Path) -> None:
    hf = make_folder(tmp_path / "hf", family)
    for i, layout in enumerate(LAYOUTS if family in DENSE else LAYOUTS + EXPERTS):
        megatron, back = tmp_path / f"megatron{i}", tmp_path / f"back{i}"
        assert to_megatron_(hf, megatron, layout) == 0
        assert to_hf_(megatron, back, SHARD) == 0
        assert_same(hf, back)
        assert json.loads((back / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
        assert (back / "tokenizer.json").is_file()
        index = json.loads((back / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == sorted(file.name for file in back.glob("*.safetensors"))
        shutil.rmtree(megatron)
        shutil.rmtree(back)


def test_a_head_beside_the_embedding_that_it_is_tied_to_is_not_read(tmp_path: Path) -> None:
    """Some writers store it; transformers does not read it either."""
    hf, beside = make_folder(tmp_path / "hf", "qwen3_tied"), tmp_path / "beside"
    shutil.copytree(hf, beside)
    head = torch.zeros_like(tensors_of(hf)["model.embed_tokens.weight"])
    save_file(tensors_of(hf) | {"lm_head.weight": head}, beside / "model.safetensors", {"format": "pt"})
    assert (
        to_megatron_(beside, tmp_path / "megatron", "--pp 2") == to_hf_(tmp_path / "megatron", tmp_path / "back") == 0
    )
    assert_same(hf, tmp_path / "back")


def test_torch_reads_what_we_write_and_we_read_what_torch_writes(folder: Path, tmp_path: Path) -> None:
    """Regression test of the private names in megarl/weights/files/torch_dist.py."""
    assert to_megatron_(folder, tmp_path / "megatron", "--tp 2 --etp 2 --verify") == 0
    with_reader = TorchDistReader(tmp_path / "megatron")
    want = {key: with_reader.read(key, Rect.whole(spec.shape)) for key, spec in with_reader.tensors.items()}
    state = {key: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for key, s in with_reader.tensors.items()}
    dcp.load(state, checkpoint_id=tmp_path / "megatron", no_dist=True)
    for key, bits in want.items():
        assert np.array_equal(bits, bits_of(state[key])), key
    dcp.save(
        {"a": state["output_layer.weight"], "b": torch.tensor(3.0)}, checkpoint_id=tmp_path / "torch", no_dist=True
    )
    theirs = TorchDistReader(tmp_path / "torch")
    found = theirs.read("a", Rect((3, 0), (5, 32)))
    assert np.array_equal(found, bits_of(state["output_layer.weight"][3:8]))
    assert tensor_of(theirs.read("b", Rect.whole(())), "float32").item() == 3


def test_what_is_pickled_without_torch_is_what_torch_would_pickle() -> None:
    """torch/distributed/checkpoint/metadata.py and filesystem.py; more chunks than one byte counts."""
    specs = {f"a.{n}": Spec("bfloat16", (2, 300)) for n in range(300)} | {"b": Spec("int64", ())}
    chunks = [(key, Rect((row, 0), (1, 300)), "f", 70_000 * row, 7) for key in specs if key != "b" for row in (0, 1)]
    chunks.append(("b", Rect((), ()), "g", 2**33, 8))
    want = meta.Metadata({}, {}, {}, meta.StorageMeta())
    for key, spec in specs.items():
        properties = meta.TensorProperties(getattr(torch, spec.dtype))
        want.state_dict_metadata[key] = meta.TensorStorageMetadata(properties, torch.Size(spec.shape), [])
    for key, rect, file, offset, length in chunks:
        place = meta.ChunkStorageMetadata(torch.Size(rect.offset), torch.Size(rect.size))
        want.state_dict_metadata[key].chunks.append(place)  # type: ignore[union-attr]
        want.storage_data[meta.MetadataIndex(key, torch.Size(rect.offset))] = _StorageInfo(file, offset, length)
    got = pickle.loads(metadata_pickle(specs, chunks))
    assert got == want
    assert type(got.state_dict_metadata["b"].size) is torch.Size and list(got.storage_data) == list(want.storage_data)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", [(), (5,), (3, 1, 7), (0, 4)])
def test_torch_loads_an_archive_written_without_it(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    spec = Spec(dtype, shape)
    tensor = (torch.arange(spec.numel).reshape(shape) % 2).to(getattr(torch, dtype))
    file = DiskFile(tmp_path / "file")
    file.write(b"x" * 77)  # of another archive
    write_tensor(file, spec, [bytes_of(bits_of(tensor))])
    file.close()
    content = (tmp_path / "file").read_bytes()[77:]
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert found.dtype == tensor.dtype and found.stride() == tensor.stride() and torch.equal(found, tensor)
    raw = RawFile(tmp_path / "file")
    begin = elements_of(raw, 77, len(content), shape)
    raw.close()
    assert content[begin - 77 :].startswith(bits_of(tensor).tobytes()) and (begin - 77) % 64 == 0
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None


def test_an_archive_with_a_changed_byte_is_named_in_one_line(tmp_path: Path) -> None:
    """Nothing but a ValueError, or a UserError where the file ends too early, whatever the byte."""
    file = DiskFile(tmp_path / "whole")
    write_tensor(file, Spec("bfloat16", (2, 3)), [memoryview(bytes(12))])
    file.close()
    content = (tmp_path / "whole").read_bytes()
    for place in range(len(content)):
        for mask in (0x01, 0x80):
            changed = bytearray(content)
            changed[place] ^= mask
            (tmp_path / "changed").write_bytes(changed)
            raw = RawFile(tmp_path / "changed")
            with contextlib.suppress(ValueError, UserError):
                elements_of(raw, 0, len(changed), (2, 3))
            raw.close()


def test_an_fp8_tensor_without_its_scale_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "fp8")
    [file] = copy.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    assert_refused(capsys, lambda: to_megatron_(copy, tmp_path / "out"), f"'{name}' is float8_e4m3fn and has no scale")
    assert not (tmp_path / "out").exists()


def test_a_conversion_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    """Its import takes about as long as the bytes of a small model."""
    code = (
        "import sys\nfrom megarl.convert.commands import hf_to_megatron_main, megatron_to_hf_main\n"
        f"assert not hf_to_megatron_main(['--hf', {str(folder)!r}, '--out', 'm', '--tp', '2', '--verify'])\n"
        "assert not megatron_to_hf_main(['--megatron', 'm', '--out', 'h', '--verify'])\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_a_second_call_goes_on_after_a_kill(
    direction: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, convert, writer, files = folder, to_megatron_, TorchDistWriter, "*.distcp"
    if direction == "to_hf":
        assert to_megatron_(folder, tmp_path / "source") == 0
        source, convert, files = tmp_path / "source", to_hf_, "*.safetensors"
        writer = SafetensorsWriter  # type: ignore[assignment]
    assert convert(source, tmp_path / "want", SHARD) == 0
    closed, close = [], writer.close

    def killed(self: Any) -> None:
        if len(closed) == 2:
            raise KeyboardInterrupt
        closed.append(close(self))

    monkeypatch.setattr(writer, "close", killed)
    assert convert(source, tmp_path / "out", SHARD) == 130
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob(files) if not file.name.startswith(".")}
    assert len(kept) == 2
    monkeypatch.setattr(writer, "close", close)
    assert convert(source, tmp_path / "out", SHARD + " --verify") == 0
    assert not partial.exists()
    names = sorted(file.name for file in (tmp_path / "want").iterdir() if file.is_file())
    assert names == sorted(file.name for file in (tmp_path / "out").iterdir() if file.is_file())
    for file in (tmp_path / "want").glob(files):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept


def test_a_changed_source_begins_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = shutil.copytree(folder, tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(to_megatron, "write_metadata", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert to_megatron_(hf, tmp_path / "out") == 130
    changed = {name: tensor.flip(0) for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(changed, hf / "model.safetensors", {"format": "pt"})
    assert to_megatron_(hf, tmp_path / "out") == 0 and to_hf_(tmp_path / "out", tmp_path / "back") == 0
    assert_same(hf, tmp_path / "back")


def test_another_shard_size_keeps_no_file_of_the_same_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many files, other tensors in each; the first was finished."""
    assert to_megatron_(folder, tmp_path / "megatron") == 0
    monkeypatch.setattr(to_hf, "plan_shards", lambda specs, size: _two_files(specs, size // 2**20))
    write = to_hf._write

    def killed(reader: Any, folder: Path, shard: ShardFile, progress: Any) -> None:
        if shard.file.startswith("model-00002"):
            raise KeyboardInterrupt
        write(reader, folder, shard, progress)

    with monkeypatch.context() as patch:
        patch.setattr(to_hf, "_write", killed)
        assert to_hf_(tmp_path / "megatron", tmp_path / "out", f"--shard-gib {3 / 1024}") == 130
    assert to_hf_(tmp_path / "megatron", tmp_path / "out", f"--shard-gib {5 / 1024}") == 0
    assert_same(folder, tmp_path / "out")


def _two_files(specs: Any, first: int) -> list[ShardFile]:
    rows = list(specs.items())
    return [
        ShardFile("model-00001-of-00002.safetensors", dict(rows[:first])),
        ShardFile("model-00002-of-00002.safetensors", dict(rows[first:])),
    ]


@pytest.mark.parametrize("left", ["", "[[1]]", "[]"])
def test_a_file_whose_journal_a_crash_cut_is_written_anew(
    left: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(to_megatron, "write_metadata", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert to_megatron_(folder, tmp_path / "out") == 130
    (tmp_path / ".out.partial" / to_megatron.JOURNAL / "__0_0.distcp").write_text(left)
    assert to_megatron_(folder, tmp_path / "out") == 0 and to_hf_(tmp_path / "out", tmp_path / "back") == 0
    assert_same(folder, tmp_path / "back")


def truncate(hf: Path) -> None:
    os.truncate(hf / "model.safetensors", (hf / "model.safetensors").stat().st_size - 10)


def change(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(hf: Path) -> None:
        tensors = load_file(hf / "model.safetensors")
        edit(tensors)
        save_file(tensors, hf / "model.safetensors", {"format": "pt"})

    return apply


def split_and_lose(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:5]}, hf / "a.safetensors")
    (hf / "model.safetensors").unlink()
    where = dict.fromkeys(names[:5], "a.safetensors") | dict.fromkeys(names[5:], "b.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


BAD: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "truncated": (truncate, "", "is truncated"),
    "not safetensors": (
        lambda hf: (hf / "model.safetensors").write_bytes(b"<html>" * 99),
        "",
        "not a safetensors file",
    ),
    "missing shard": (split_and_lose, "", "lacks b.safetensors, which its index names"),
    "missing tensor": (change(lambda t: t.pop("model.norm.weight")), "", "'model.norm.weight' is missing"),
    "unknown tensor": (change(lambda t: t.update(extra=torch.zeros(2))), "", "has not, first 'extra'"),
    "wrong shape": (
        change(lambda t: t.update({"model.norm.weight": torch.zeros(33)})),
        "",
        "has shape \\(33,\\), config.json wants \\(32,\\)",
    ),
    "mixed dtypes": (
        change(lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(64, 32)})),
        "",
        "k_proj.*float32.*bfloat16",
    ),
    "no config": (lambda hf: (hf / "config.json").unlink(), "", "no config.json"),
    "empty config": (lambda hf: (hf / "config.json").write_text(""), "", "config.json' is not a JSON object"),
    "config in latin-1": (lambda hf: (hf / "config.json").write_bytes(b'"\xe9"'), "", "is not a JSON object"),
    "config of a list": (lambda hf: (hf / "config.json").write_text("[1]"), "", "is not a JSON object"),
    "config of nothing": (lambda hf: (hf / "config.json").write_text("{}"), "", "model_type '\\?' has no weight map"),
    "tp": (lambda hf: None, "--tp 3", "--tp 3 does not divide"),
    "pp": (lambda hf: None, "--pp 3", "pp 3 x vpp 1 does not divide"),
    "ep": (lambda hf: None, "--ep 3", "--ep 3 does not divide"),
    "zero": (lambda hf: None, "--tp 0", "--tp 0 is below 1"),
    "shard size": (lambda hf: None, "--shard-gib 0", "--shard-gib 0.0 is not above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_left(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, options, match = BAD[name]
    hf = shutil.copytree(folder, tmp_path / "hf")
    damage(hf)
    assert_refused(capsys, lambda: to_megatron_(hf, tmp_path / "out", options), match)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def assert_refused(capsys: pytest.CaptureFixture[str], call: Callable[[], int], match: str) -> None:
    import re

    capsys.readouterr()
    assert call() == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(match, line), line


def test_bad_checkpoints_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "megatron"
    assert to_megatron_(folder, whole, SHARD) == 0
    out = tmp_path / "back"

    def damaged(name: str) -> Path:
        return shutil.copytree(whole, tmp_path / name)

    os.truncate(damaged("truncated") / "__0_1.distcp", 1000)
    (damaged("missing") / "__0_1.distcp").unlink()
    (damaged("without") / ".metadata").unlink()
    tree = json.loads((whole / "hf" / "config.json").read_text())
    for name, change in {
        "narrower": {"moe_intermediate_size": 8},
        "longer": {"num_hidden_layers": 5},
        "shorter": {"num_hidden_layers": 3},
    }.items():
        (damaged(name) / "hf" / "config.json").write_text(json.dumps(tree | change))
    (damaged("empty") / "hf" / "config.json").write_text("")
    for name, match in {
        "truncated": "is truncated",
        "missing": "is missing",
        "without": "no .metadata",
        "empty": "config.json' is not a JSON object",
        "narrower": "has shape",
        "longer": "lacks 'decoder.layers.4.",
        "shorter": "'decoder.layers.3.*unknown to the weight map",
    }.items():
        assert_refused(capsys, lambda name=name: to_hf_(tmp_path / name, out), match)  # type: ignore[misc]
        assert not out.exists(), name


class Payload:
    """What a pickle of somebody else's may do to whoever loads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_metadata_runs_nothing_and_may_name_unknown_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """megarl/weights/files/torch_dist.py, _Metadata; megatron-core 0.15 has a class of its own for all of it."""
    assert to_megatron_(folder, tmp_path / "megatron") == 0
    file = tmp_path / "megatron" / ".metadata"
    theirs = pickle.loads(file.read_bytes())
    theirs.planner_data = Payload(tmp_path / "inside")
    theirs.__class__ = type("Theirs", (type(theirs),), {"__module__": "older"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "older", types.SimpleNamespace(Theirs=type(theirs)))  # type: ignore[arg-type]
        file.write_bytes(pickle.dumps(theirs))
    assert to_hf_(tmp_path / "megatron", tmp_path / "back") == 0
    assert_same(folder, tmp_path / "back")
    file.write_bytes(pickle.dumps(Payload(tmp_path / "alone")))
    assert_refused(capsys, lambda: to_hf_(tmp_path / "megatron", tmp_path / "out"), ".metadata' cannot be read")
    assert not (tmp_path / "inside").exists() and not (tmp_path / "alone").exists()


def test_a_checkpoint_deleted_meanwhile_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert to_megatron_(folder, tmp_path / "step_3", SHARD) == 0
    write = SafetensorsWriter.write_pieces

    def deleted(self: Any, name: str, pieces: Any) -> None:
        write(self, name, pieces)
        shutil.rmtree(tmp_path / "step_3", ignore_errors=True)

    monkeypatch.setattr(SafetensorsWriter, "write_pieces", deleted)
    assert_refused(
        capsys, lambda: to_hf_(tmp_path / "step_3", tmp_path / "out", SHARD), "was deleted while it was read"
    )
    assert not (tmp_path / "out").exists()


def test_out_that_exists_is_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert_refused(capsys, lambda: to_megatron_(folder, tmp_path / "out"), "already exists")
    assert (tmp_path / "out").read_text() == "mine"
    assert_refused(capsys, lambda: to_megatron_(folder, tmp_path / "out" / "inside"), "out' is a file; give another")
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "mine").touch()
    assert_refused(capsys, lambda: to_megatron_(folder, tmp_path / "new"), "written under the name .*; move it away")
    assert (tmp_path / ".new.partial" / "mine").exists()


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_a_full_disk_is_one_line_and_the_next_call_goes_on(
    direction: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, convert = folder, to_megatron_
    if direction == "to_hf":
        assert to_megatron_(folder, tmp_path / "source") == 0
        source, convert = tmp_path / "source", to_hf_
    written, save, pwrite = [], torch.save, os.pwrite

    def full(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            written.append(1)
            if len(written) > 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full(save))
        patch.setattr(os, "pwrite", full(pwrite))
        assert_refused(capsys, lambda: convert(source, tmp_path / "out", SHARD), "the disk is full")
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", SHARD + " --verify") == 0


def test_too_little_space_is_told_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    assert_refused(capsys, lambda: to_megatron_(folder, tmp_path / "out"), "the disk has 0.00 GiB free")


def test_verify_sees_a_flipped_bit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = to_hf.MegatronReader.bits

    def flipped(self: Any, piece: Any) -> np.ndarray:
        bits = original(self, piece)
        if piece.hf_name == "model.norm.weight":
            bits[5] ^= 1
        return bits

    monkeypatch.setattr(to_hf.MegatronReader, "bits", flipped)
    assert_refused(
        capsys, lambda: to_megatron_(folder, tmp_path / "out", "--verify"), "'model.norm.weight' was not written"
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
