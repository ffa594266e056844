"""Rectangles: how megarl/weights says "this part of that tensor", in a plan, on the wire and on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, sub

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rect:
    """tensor[offset : offset + size] on every axis, in elements."""

    offset: Shape
    size: Shape

    @staticmethod
    def whole(shape: Shape) -> Rect:
        return Rect((0,) * len(shape), shape)

    @staticmethod
    def around(rects: Sequence[Rect]) -> Rect:
        """The smallest one that holds all."""
        offset = tuple(map(min, zip(*(rect.offset for rect in rects), strict=True)))
        end = tuple(map(max, zip(*(rect.end for rect in rects), strict=True)))
        return Rect(offset, tuple(map(sub, end, offset)))

    @property
    def end(self) -> Shape:
        return tuple(map(add, self.offset, self.size))

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """tensor[rect.slices] is a view of it."""
        return tuple(map(slice, self.offset, self.end))

    def intersect(self, other: Rect) -> Rect | None:
        """None where the two share no element."""
        offset = tuple(map(max, self.offset, other.offset))
        size = tuple(map(sub, map(min, self.end, other.end), offset))
        return Rect(offset, size) if min(size, default=1) > 0 else None

    def within(self, outer: Rect) -> Rect:
        """The same elements, counted from the first one of `outer`."""
        return Rect(tuple(map(sub, self.offset, outer.offset)), self.size)

    def moved(self, by: Shape) -> Rect:
        return Rect(tuple(map(add, self.offset, by)), self.size)

    def rows(self, first: int, count: int) -> Rect:
        """`count` rows of it (along the first axis) from row `first` on."""
        return self.along(0, self.offset[0] + first, count)

    def along(self, axis: int, offset: int, size: int) -> Rect:
        """The same on all axes but one."""
        return Rect(
            (*self.offset[:axis], offset, *self.offset[axis + 1 :]), (*self.size[:axis], size, *self.size[axis + 1 :])
        )

    def __str__(self) -> str:
        return f"[{', '.join(f'{a}:{b}' for a, b in zip(self.offset, self.end, strict=True))}]"
