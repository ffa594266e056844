"""A Hugging Face folder as output: sharded safetensors with their
index, written as tensors come; config and tokenizer carried along.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megarl.weights.buckets import fill_buckets
from megarl.weights.files.hf_extras import exported_config
from megarl.weights.files.hf_index import INDEX
from megarl.weights.files.raw_file import Bits, Spec
from megarl.weights.files.safetensors_file import SafetensorsWriter

SHARD_BYTES = 4 * 2**30
CARRIED_TENSORS = "carried.safetensors"  # in the hf/ folder of a Megatron checkpoint
CARRIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
CARRIED_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class ShardFile:
    file: str
    specs: dict[str, Spec]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def plan_shards(specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES) -> list[ShardFile]:
    """Consecutive tensors, at most `shard_bytes` a file unless one alone is larger. One file is model.safetensors.

    huggingface_hub's split sets a larger one aside, so that its files are not written one after the other.
    """
    groups = list(fill_buckets(((name, spec.nbytes) for name, spec in specs.items()), shard_bytes))
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    return [ShardFile(file, {name: specs[name] for name in group}) for file, group in zip(names, groups, strict=True)]


def write_index(folder: Path, shards: list[ShardFile]) -> None:
    """Nothing for a single file, which needs none."""
    if len(shards) > 1:
        where = {name: shard.file for shard in shards for name in shard.specs}
        index = {"metadata": {"total_size": sum(shard.nbytes for shard in shards)}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class ShardedWriter:
    """Tensors in the order of `shards` into `folder`; a shard has its name only when it is whole and on disk."""

    def __init__(self, folder: Path, shards: list[ShardFile]) -> None:
        self.folder, self.shards = folder, shards
        self._pending = iter(shards)
        self._writer: SafetensorsWriter | None = None
        self._left: set[str] = set()
        self._file = ""

    def write(self, name: str, bits: Bits) -> None:
        if self._writer is None:
            shard = next(self._pending)
            self._file, self._left = shard.file, set(shard.specs)
            self._writer = SafetensorsWriter(self.folder / f".{shard.file}", shard.specs)
        self._writer.write(name, bits)
        self._left.remove(name)
        if not self._left:
            self._writer.close()
            os.replace(self._writer.path, self.folder / self._file)
            self._writer = None

    def finish(self) -> None:
        if self._left or list(self._pending):
            raise ValueError(f"{self.folder}: not all tensors came")
        write_index(self.folder, self.shards)


def carry_files(source: Path, target: Path, dtype: str | None = None) -> None:
    """Config, tokenizer, licence. dtype: of the weights beside which config.json will lie; its own key follows it."""
    for pattern in CARRIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
    for name in CARRIED_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    config = target / "config.json"
    if not config.is_file():
        return
    tree = json.loads(config.read_text(encoding="utf-8"))
    changed = exported_config(tree)
    key = "torch_dtype" if "torch_dtype" in tree else "dtype"
    if dtype is not None and tree.get(key) is not None:
        changed[key] = dtype
    if changed != tree:
        config.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def carry_tensors(
    source: str | Path, target: Path, names: list[str], spec: Callable[[str], Spec], read: Callable[[str], Bits]
) -> None:
    """What belongs to the model but is not trained, into
    `target`/carried.safetensors; a link where `source` has that file already.
    """
    if not names:
        return
    known = Path(source) / CARRIED_TENSORS
    if known.is_file():
        try:
            os.link(known, target / CARRIED_TENSORS)
        except OSError:
            shutil.copyfile(known, target / CARRIED_TENSORS)
        return
    writer = SafetensorsWriter(target / CARRIED_TENSORS, {name: spec(name) for name in names})
    try:
        for name in names:
            writer.write(name, read(name))
        writer.close()
    finally:
        writer.abort()
