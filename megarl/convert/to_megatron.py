"""A Hugging Face folder as a Megatron checkpoint that any layout reads."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from megarl.checkpoints import HF_FILES, STATE
from megarl.convert.output import fingerprint, output_folder
from megarl.convert.to_hf import refuse_other_bits
from megarl.convert.transfer import Transfer
from megarl.errors import UserError
from megarl.weights.buckets import fill_buckets
from megarl.weights.files.hf_folder import carry_files, carry_tensors
from megarl.weights.files.hf_reader import HfReader
from megarl.weights.files.megatron_folder import MegatronReader, NewChunk, chunks_of_rank, placed_pieces, whole_params
from megarl.weights.files.raw_file import Spec
from megarl.weights.files.torch_dist import Chunk, TorchDistWriter, write_metadata
from megarl.weights.files.torch_pickles import STORAGE
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap, load_hf_config
from megarl.weights.rect import Rect

JOURNAL = ".journal"  # one file for each finished data file: where its chunks lie


@dataclass(frozen=True)
class _File:
    name: str
    chunks: list[NewChunk]
    nbytes: int


def hf_to_megatron(hf_folder: Path, out: Path, layout: Layout, file_bytes: int, verify: bool = False) -> None:
    """Writes one file or more for each rank of `layout`. Memory: a small multiple of the largest tensor.

    Tensors keep their dtype; a run casts them to its own when it loads them.
    """
    weight_map = WeightMap(load_hf_config(hf_folder))
    with HfReader(hf_folder) as reader:
        specs = reader.specs(weight_map)
        if reader.index.left_aside:
            print(reader.index.left_aside)
        stored = _global_specs(weight_map, specs)
        files = _plan_files(weight_map, layout, specs, file_bytes)
        total = sum(file.nbytes for file in files)
        plan = {
            "source": str(hf_folder.absolute()),
            "files": fingerprint(hf_folder, ("*.safetensors", "config.json")),
            "layout": asdict(layout),
            "file_bytes": file_bytes,
        }
        with output_folder(out, plan, total) as partial:
            progress = Transfer("writing", total)
            (partial / JOURNAL).mkdir(exist_ok=True)
            chunks = [chunk for file in files for chunk in _write(reader, partial, file, specs, progress)]
            (partial / HF_FILES).mkdir(exist_ok=True)
            carry_files(hf_folder, partial / HF_FILES)
            carry_tensors(hf_folder, partial / HF_FILES, reader.carried(weight_map), reader.spec, reader.whole_bits)
            (partial / STATE).write_text(
                json.dumps({"converted_from": str(hf_folder.absolute()), "layout": asdict(layout)}), encoding="utf-8"
            )
            write_metadata(partial, stored, chunks)
            shutil.rmtree(partial / JOURNAL)
            progress.finish()
            if verify:
                verify_megatron(reader, partial, weight_map, specs)


def _plan_files(weight_map: WeightMap, layout: Layout, specs: dict[str, Spec], file_bytes: int) -> list[_File]:
    placed = placed_pieces(weight_map)

    def nbytes(chunk: NewChunk) -> int:
        return chunk.rect.numel * specs[chunk.pieces[0].hf_name].itemsize

    files: list[_File] = []
    for rank in range(layout.world):
        sized = ((chunk, nbytes(chunk)) for chunk in chunks_of_rank(weight_map, layout, rank, placed))
        for number, chunks in enumerate(fill_buckets(sized, file_bytes)):
            files.append(_File(f"__{rank}_{number}.distcp", chunks, sum(map(nbytes, chunks))))
    return files


def _write(reader: HfReader, folder: Path, file: _File, specs: dict[str, Spec], progress: Transfer) -> list[Chunk]:
    journal = folder / JOURNAL / file.name
    if (folder / file.name).is_file() and (written := _journalled(journal, file)) is not None:
        progress.skip(file.nbytes)
        return written
    writer = TorchDistWriter(folder, file.name)
    try:
        for chunk in file.chunks:
            spec = Spec(specs[chunk.pieces[0].hf_name].dtype, chunk.rect.size)
            places = ((piece.local, piece) for piece in chunk.pieces)
            pieces = reader.pieces(Rect.whole(chunk.rect.size[chunk.lead :]), places)
            writer.write(chunk.key, chunk.rect.offset, spec, pieces)
            progress.add(spec.nbytes)
        rows = [[c.key, c.rect.offset, c.rect.size, c.file, c.offset, c.length] for c in writer.chunks]
        journal.write_text(json.dumps(rows), encoding="utf-8")
        writer.close()
    except BaseException:
        writer.abort()
        raise
    return writer.chunks


def _journalled(journal: Path, file: _File) -> list[Chunk] | None:
    """Where the chunks of a finished file lie; None where a crash left no whole journal."""
    try:
        rows = json.loads(journal.read_text(encoding="utf-8"))
        chunks = [Chunk(key, Rect(tuple(offset), tuple(size)), *place) for key, offset, size, *place in rows]
    except (OSError, ValueError, TypeError):
        return None
    return chunks if len(chunks) == len(file.chunks) else None


def _global_specs(weight_map: WeightMap, specs: dict[str, Spec]) -> dict[str, Spec]:
    """UserError where tensors that make one parameter differ in dtype, or have one that no parameter can have."""
    by_key: dict[str, Spec] = {}
    for name, spec in specs.items():
        if spec.dtype not in STORAGE:
            raise UserError(
                f"tensor {name!r} is {spec.dtype} and has no scale beside it; copy the checkpoint again, or convert "
                "it to bfloat16"
            )
    for param, where in whole_params(weight_map):
        for piece in param.pieces:
            spec = by_key.setdefault(where.key, Spec(specs[piece.hf_name].dtype, where.shape))
            if spec.dtype != specs[piece.hf_name].dtype:
                raise UserError(
                    f"tensor {piece.hf_name!r} is {specs[piece.hf_name].dtype}, others of {where.key!r} are "
                    f"{spec.dtype}; use one dtype"
                )
    return by_key


def verify_megatron(reader: HfReader, folder: Path, weight_map: WeightMap, specs: dict[str, Spec]) -> None:
    """Reads both sides again and compares them bit for bit."""
    progress = Transfer("verifying", sum(spec.nbytes for spec in specs.values()))
    with MegatronReader(folder, weight_map) as written:
        for name in [*specs, *reader.carried(weight_map)]:
            refuse_other_bits(name, reader, written, folder)
            progress.add(reader.spec(name).nbytes)
    progress.finish()
