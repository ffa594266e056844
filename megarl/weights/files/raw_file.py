"""Arrays in files, read by rectangle: what both formats on disk come down to."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.weights.rect import Rect, Shape


@dataclass(frozen=True)
class Spec:
    """What a tensor is, without its content."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


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

    def close(self) -> None:
        os.close(self._handle)

    def read_bytes(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data), offset)
        return bytes(data)

    def read(self, offset: int, spec: Spec, rect: Rect) -> Tensor:
        """A rectangle of the array of `spec` that begins at byte `offset`.

        Reads whole rows of the first axis that has more than one: of a
        stacked expert's gate and up, only the half that is asked for.
        """
        shape = spec.shape
        if len(shape) > 1 and shape[0] == 1:
            inner = Rect(rect.offset[1:], rect.size[1:])
            return self.read(offset, Spec(spec.dtype, shape[1:]), inner).unsqueeze(0)
        rows = torch.empty((*rect.size[:1], *shape[1:]), dtype=spec.dtype)
        if rows.numel():
            skipped = rect.offset[0] * math.prod(shape[1:]) * spec.dtype.itemsize if shape else 0
            self._fill(bytes_of(rows), offset + skipped)
        return rows if rect.size[1:] == shape[1:] else rows[(slice(None), *rect.slices[1:])].contiguous()

    def _fill(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._handle, [target[done:]], offset + done)
            if not count:
                raise UserError(
                    f"{str(self.path)!r} is truncated: it ends at byte {offset + done}; copy the checkpoint again"
                )
            done += count


def put_together(rect: Rect, parts: Iterable[tuple[Rect, Tensor]]) -> Tensor | None:
    """The tensor of `rect` from its parts, which do not overlap, each with its rectangle; a part that is all of it as
    it is. None where they do not cover it.
    """
    whole: Tensor | None = None
    covered = 0
    for part, values in parts:
        if part == rect:
            return values
        if whole is None:
            whole = torch.empty(rect.size, dtype=values.dtype)
        whole[part.within(rect).slices] = values
        covered += part.numel
    return whole if covered == rect.numel else None
