"""The rows of a data file: JSONL, gzipped or not, Parquet, or a folder that `datasets` saved. Bad ones are named."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megarl.errors import UserError

KINDS = "a JSONL file (.gz too), a Parquet file, or a folder of datasets' save_to_disk"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class BadLine(Exception):
    """What is wrong with a row and how to mend it; the file and the line are added where it is caught."""


def read_rows(path: str | Path, shape: str) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """(1-based number, the row or what is wrong with it) of every row; blank lines are none. shape: of a row, to say.

    Raises UserError for a path that holds no rows at all, or needs the extra `datasets` where that is missing.
    """
    path = Path(path)
    if path.is_dir():
        yield from enumerate(_dataset_rows(path), 1)
        return
    if not path.is_file():
        raise UserError(f"data file {str(path)!r} does not exist; give {KINDS}, rows {shape}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        yield from enumerate(_parquet_rows(path), 1)
    elif magic == b"\x28\xb5\x2f\xfd":
        raise UserError(f"data file {str(path)!r} is compressed by zstd; unpack it first (zstd -d), or use gzip")
    else:
        yield from _json_rows(path, shape, gzipped=magic[:2] == b"\x1f\x8b")


def _json_rows(path: Path, shape: str, gzipped: bool) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    # Lines end at a line feed alone: str.splitlines would also split at U+2028 inside a text.
    with gzip.open(path, "rb") if gzipped else path.open("rb") as file:
        try:
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    yield line, _parse(raw.rstrip(b"\r\n"), shape)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"data file {str(path)!r} cannot be unpacked ({error}); copy it again") from None


def _parse(raw: bytes, shape: str) -> dict[str, Any] | BadLine:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadLine(f"not UTF-8 at byte {error.start}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        if raw.lstrip()[:1] == b"[":
            return BadLine(f"begins a list; write one row {shape} a line (jq -c '.[]' FILE)")
        return BadLine(f"not JSON ({error.msg} at column {error.colno}); write one row {shape} a line")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        return BadLine(f"not JSON that Python reads ({error}); mend it")
    if not isinstance(row, dict):
        return BadLine(f"holds a {type(row).__name__}; write one row {shape} a line")
    if _SURROGATE.search(raw):
        for key, value in row.items():
            try:
                json.dumps([key, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                return BadLine(f"key {key!r} holds {half!r}, half a character that no text has; write the whole one")
    return row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"data file {str(path)!r} is Parquet; install the datasets extra (pip install 'megarl[datasets]'), "
            "or write it as JSONL"
        ) from None
    try:
        for batch in ParquetFile(path).iter_batches():
            yield from map(_as_written, batch.to_pylist())
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"data file {str(path)!r} cannot be read as Parquet ({reason}); write it again") from None


def _dataset_rows(folder: Path) -> Iterable[dict[str, Any]]:
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8")).get("splits", [])
        raise UserError(f"data folder {str(folder)!r} holds the splits {', '.join(names)}; give one, {folder}/SPLIT")
    if not (folder / "state.json").is_file():
        raise UserError(f"data folder {str(folder)!r} has no state.json; give {KINDS}")
    try:
        from datasets import load_from_disk
    except ImportError:
        raise UserError(
            f"data folder {str(folder)!r} needs the datasets extra (pip install 'megarl[datasets]'), or JSONL"
        ) from None
    return map(_as_written, load_from_disk(str(folder)))


def _as_written(row: dict[str, Any]) -> dict[str, Any]:
    """An Arrow struct has every field that any row has, as None: lists, of messages or tools, are without them. What a
    message's content is, templates ask.
    """
    return {key: _without_none(value) if isinstance(value, list) else value for key, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None or key == "content"}
    return [_without_none(part) for part in value] if isinstance(value, list) else value
