"""A Megatron checkpoint, of a run or converted, as a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from megarl.announce import announce
from megarl.checkpoints import FILES, STATE, damage, hf_files, state_of
from megarl.convert.output import fingerprint, output_folder
from megarl.convert.transfer import Transfer
from megarl.errors import UserError
from megarl.weights.files.hf_folder import ShardFile, carry_files, plan_shards, write_index
from megarl.weights.files.hf_reader import HfReader
from megarl.weights.files.megatron_folder import MegatronReader
from megarl.weights.files.raw_file import Spec
from megarl.weights.files.safetensors_file import SafetensorsWriter

READERS = 8  # of files, at most


def megatron_to_hf(megatron: Path, out: Path, shard_bytes: int, verify: bool = False) -> None:
    """Every tensor in the dtype the checkpoint holds it in. Memory: a small multiple of the largest tensor."""
    _refuse_damaged(megatron)
    with MegatronReader(megatron) as reader:
        trained = reader.specs()
        specs = trained | {name: reader.spec(name) for name in reader.carried(reader.weight_map)}
        shards = plan_shards(specs, shard_bytes)
        plan = {
            "source": str(megatron.absolute()),
            "files": fingerprint(megatron, (".metadata",)),
            "shards": {shard.file: list(shard.specs) for shard in shards},
        }
        with output_folder(out, plan, sum(shard.nbytes for shard in shards)) as partial:
            progress = Transfer("writing", sum(shard.nbytes for shard in shards))
            for shard in shards:
                _write(reader, partial, shard, progress)
            write_index(partial, shards)
            carry_files(hf_files(megatron), partial, _common_dtype(trained))
            progress.finish()
            if verify:
                verify_hf(reader, partial, specs)


def _refuse_damaged(megatron: Path) -> None:
    """Of a run's checkpoint every file is read, the optimizer's part too: files hold both."""
    if not (megatron / STATE).is_file():
        return
    size = sum(file.stat().st_size for file in megatron.rglob("*") if file.is_file())
    announce(f"comparing the checksums of {megatron}, {size / 1e9:,.1f} GB")
    count = 0 if (fault := damage(megatron)) else len(state_of(megatron).get(FILES, {}))
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, READERS))
    try:
        each = [pool.submit(damage, megatron, contents=True, share=(i, count)) for i in range(count)]
        if fault := fault or next(filter(None, (future.result() for future in as_completed(each))), None):
            raise UserError(f"checkpoint {str(megatron)!r} is damaged ({fault}); copy it again, or give another")
    finally:  # also where it is interrupted: the files that are being read are the last
        pool.shutdown(wait=False, cancel_futures=True)


def _write(reader: MegatronReader, folder: Path, shard: ShardFile, progress: Transfer) -> None:
    if (folder / shard.file).is_file():
        progress.skip(shard.nbytes)
        return
    writer = SafetensorsWriter(folder / f".{shard.file}", shard.specs)
    try:
        for name, spec in shard.specs.items():
            writer.write_pieces(name, reader.pieces(name))
            progress.add(spec.nbytes)
        writer.close()
    finally:
        writer.abort()
    os.replace(folder / f".{shard.file}", folder / shard.file)


def verify_hf(reader: MegatronReader, folder: Path, specs: dict[str, Spec]) -> None:
    """Reads both sides again and compares them bit for bit."""
    progress = Transfer("verifying", sum(spec.nbytes for spec in specs.values()))
    with HfReader(folder) as written:
        for name, spec in specs.items():
            refuse_other_bits(name, reader, written, folder)
            progress.add(spec.nbytes)
    progress.finish()


def refuse_other_bits(
    name: str, read: HfReader | MegatronReader, written: HfReader | MegatronReader, out: Path
) -> None:
    """Removes `out` and raises UserError where the two differ in the tensor `name`."""
    if read.spec(name) != written.spec(name) or not np.array_equal(read.whole_bits(name), written.whole_bits(name)):
        shutil.rmtree(out)
        raise UserError(f"--verify: {name!r} was not written as it was read; check the disk and convert again")


def _common_dtype(specs: dict[str, Spec]) -> str:
    """Of most of the bytes: what config.json calls the model's dtype."""
    totals: dict[str, int] = {}
    for spec in specs.values():
        totals[spec.dtype] = totals.get(spec.dtype, 0) + spec.nbytes
    return max(totals, key=lambda dtype: totals[dtype])
