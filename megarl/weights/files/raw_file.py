"""Arrays in files, read by rectangle: what both formats on disk come down to.

No torch: its import takes longer than a checkpoint of 2 GB. Elements are bits here, unsigned integers of their size;
tensors.py makes tensors of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import mul
from pathlib import Path

import numpy as np

from megarl.errors import UserError
from megarl.weights.rect import Rect, Shape

PIECE = 2**19  # bytes
Bits = np.ndarray  # of uint8, uint16, uint32 or uint64
ITEMSIZE = {  # bytes of an element, by torch's name of its dtype
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class Spec:
    """What a tensor is, without its content. dtype: a key of ITEMSIZE."""

    dtype: str
    shape: Shape

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def bits(self) -> np.dtype:
        """Of the array that holds it."""
        return np.dtype(f"u{self.itemsize}")


def bytes_of(bits: Bits) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(bits.reshape(-1).view(np.uint8).data)


class RawFile:
    """A file of row-major arrays, read by position. Raises UserError where the file is missing or ends too early."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{str(path)!r} is missing; copy the checkpoint again") from None
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
        self.size = os.fstat(self._handle).st_size
        self._piece: memoryview | None = None

    def close(self) -> None:
        os.close(self._handle)

    def read_bytes(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data), offset)
        return bytes(data)

    def read(self, offset: int, spec: Spec, rect: Rect) -> Bits:
        """A rectangle of the array of `spec` that begins at byte `offset`.

        Reads whole rows of the first axis that has more than one: of a
        stacked expert's gate and up, only the half that is asked for.
        """
        shape = spec.shape
        if len(shape) > 1 and shape[0] == 1:
            inner = Rect(rect.offset[1:], rect.size[1:])
            return self.read(offset, Spec(spec.dtype, shape[1:]), inner)[None]
        rows = np.empty((*rect.size[:1], *shape[1:]), spec.bits)
        if rows.size:
            skipped = rect.offset[0] * math.prod(shape[1:]) * spec.itemsize if shape else 0
            self._fill(bytes_of(rows), offset + skipped)
        return rows if rect.size[1:] == shape[1:] else rows[(slice(None), *rect.slices[1:])].copy()

    def pieces(self, offset: int, count: int) -> Iterator[memoryview]:
        """`count` bytes from `offset` on, in order. Each piece is overwritten by the next: it stays in the processor's
        cache, and is no memory that the kernel has to find and fill.
        """
        if self._piece is None:
            self._piece = memoryview(bytearray(PIECE))
        for begin in range(offset, offset + count, PIECE):
            piece = self._piece[: min(PIECE, offset + count - begin)]
            self._fill(piece, begin)
            yield piece

    def _fill(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._handle, [target[done:]], offset + done)
            if not count:
                raise UserError(
                    f"{str(self.path)!r} is truncated: it ends at byte {offset + done}; copy the checkpoint again"
                )
            done += count


@dataclass(frozen=True)
class Part:
    """The rectangle `inside` of an array of `spec`, which begins at byte `offset` of a file: what is yet to be read.

    rect: where it lies in what is asked for, which may have fewer axes of size 1. file: gives it, open.
    """

    rect: Rect
    file: Callable[[], RawFile]
    offset: int
    spec: Spec
    inside: Rect

    def read(self) -> Bits:
        return self.file().read(self.offset, self.spec, self.inside).reshape(self.rect.size)

    def pieces(self) -> Iterator[memoryview]:
        """Of a part that is a run."""
        place = sum(map(mul, self.inside.offset, row_strides(self.spec.shape)))
        yield from self.file().pieces(self.offset + place * self.spec.itemsize, self.rect.numel * self.spec.itemsize)

    @property
    def is_run(self) -> bool:
        """Whether its elements lie one after the other."""
        return _whole_rows(self.inside, self.spec.shape)


def _whole_rows(rect: Rect, shape: Shape) -> bool:
    """Whether it takes all of every axis after the first one of which it takes more than one element."""
    first = next((axis for axis, size in enumerate(rect.size) if size > 1), len(shape))
    return rect.size[first + 1 :] == shape[first + 1 :]


def row_strides(shape: Shape) -> Shape:
    """In elements, of an array that lies row after row, as torch has them."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def read_parts(rect: Rect, parts: Iterable[Part]) -> Bits | None:
    """The array of `rect`, put together from its parts."""
    return put_together(rect, ((part.rect, part.read()) for part in parts))


def pieces_of(rect: Rect, parts: Iterable[Part]) -> Iterator[memoryview] | None:
    """The bytes of read_parts() in order, without the array where its parts are runs of it."""
    parts = sorted(parts, key=lambda part: part.rect.offset)
    inside = [part.rect.within(rect) for part in parts]
    if all(part.is_run and _whole_rows(there, rect.size) for part, there in zip(parts, inside, strict=True)):
        if sum(part.rect.numel for part in parts) != rect.numel:
            return None
        return chain.from_iterable(part.pieces() for part in parts)
    bits = read_parts(rect, parts)
    return None if bits is None else iter([bytes_of(bits)])


def put_together(rect: Rect, parts: Iterable[tuple[Rect, Bits]]) -> Bits | None:
    """The array of `rect` from its parts, which do not overlap, each with its rectangle; a part that is all of it as
    it is. None where they do not cover it.
    """
    whole: Bits | None = None
    covered = 0
    for part, values in parts:
        if part == rect:
            return values
        if whole is None:
            whole = np.empty(rect.size, values.dtype)
        whole[part.within(rect).slices] = values
        covered += part.numel
    return whole if covered == rect.numel else None
