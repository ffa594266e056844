"""What travels in a weight sync: slices of Hugging Face tensors in messages; and the shards that they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

from megarl.weights.map.relations import HfSlice, Piece
from megarl.weights.map.weight_map import Param
from megarl.weights.rect import Rect, Shape

if TYPE_CHECKING:  # a plan is made without torch: megarl plan, tools/bench/plan.py
    import torch
    from torch import Tensor

    Tensors = Mapping[tuple[int, str], Tensor]  # a rank's parameters: (chunk, name in the weight map) -> tensor

S = TypeVar("S", bound=HfSlice, covariant=True)


def named_tensors(params: Iterable[tuple[Param, Tensor]]) -> Tensors:
    return {(param.chunk, param.name): tensor.detach() for param, tensor in params}


@dataclass(frozen=True, slots=True)
class Transfer(Piece):
    """A slice to be sent, and the parameter of the sender that it is cut from: the weight map's Param of that name."""

    chunk: int
    param: str

    def cut(self, tensors: Tensors) -> Tensor:
        return tensors[self.chunk, self.param][self.local.slices]


@dataclass(frozen=True, slots=True)
class Message(Generic[S]):
    """What trainer rank `source` sends to one rollout rank, or to all (None), in one bucket, as one buffer."""

    bucket: int
    source: int
    destination: int | None
    slices: tuple[S, ...]

    @property
    def numel(self) -> int:
        return sum(each.rect.numel for each in self.slices)


@dataclass(frozen=True, slots=True)
class TensorShard:
    """What a rollout rank holds of a Hugging Face tensor of shape `shape`: the rectangle `rect`, sent as `dtype`."""

    shape: Shape
    rect: Rect
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.rect.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """What one rollout rank receives in every sync: its shards in the order of hf_shapes, and the messages of each
    bucket. A shard lies in one bucket.
    """

    shards: dict[str, TensorShard]
    buckets: tuple[tuple[Message[HfSlice], ...], ...]

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: shard.dtype for name, shard in self.shards.items()}
