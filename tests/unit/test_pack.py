"""Messages, manifests and how slices are put together, without a network."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.reshard.hash import tensor_hash
from megarl.weights.reshard.outgoing import Slices, whole_buckets
from megarl.weights.reshard.pack import (
    ALIGNMENT,
    HASH,
    Corrupted,
    Held,
    Manifest,
    Message,
    Part,
    assemble,
    message_bytes,
    pack,
    whole_tensors,
)
from megarl.weights.reshard.rollout_layout import RolloutLayout


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    odd = torch.randn(3, 5, generator=generator)
    return {
        "a": odd,
        "transposed": odd.t(),
        "bf16": odd.bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "long": torch.arange(5),
        "fp8": odd.to(torch.float8_e4m3fn),
    }


def manifest_of(named: dict[str, torch.Tensor], bucket_bytes: int) -> Manifest:
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    return whole_tensors(
        shapes, {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in named.items()}, bucket_bytes
    )


@pytest.mark.parametrize("bucket_bytes", [1, 64, 100, 10**6])
def test_what_is_packed_is_assembled(bucket_bytes: int) -> None:
    manifest = Manifest.from_json(json.loads(json.dumps(manifest_of(tensors(), bucket_bytes).to_json())))
    assert manifest == manifest_of(tensors(), bucket_bytes)
    found: dict[str, torch.Tensor] = {}
    for bucket, outgoing in zip(manifest.buckets, whole_buckets(tensors().items(), manifest), strict=True):
        ((buffer, rank),) = outgoing.messages
        assert rank is None and buffer.numel() == message_bytes(bucket[0].parts, manifest.tensors)
        here = assemble(bucket, [buffer], manifest.tensors)
        assert all(
            t.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for t in here.values()
        )  # views
        found |= here
    assert list(found) == list(tensors())
    for name, tensor in tensors().items():
        assert (
            found[name].dtype == tensor.dtype
            and found[name].shape == tensor.shape
            and tensor_hash(found[name]) == tensor_hash(tensor)
        )
    assert len(manifest.buckets) == {1: 7, 10**6: 1}.get(bucket_bytes, len(manifest.buckets))


def test_a_stream_is_read_bucket_by_bucket() -> None:
    taken = []

    def stream() -> Any:
        for name, tensor in tensors().items():
            taken.append(name)
            yield name, tensor

    next(whole_buckets(stream(), manifest_of(tensors(), 64)))
    assert len(taken) < len(tensors())


def test_every_flipped_bit_of_a_message_is_noticed() -> None:
    """In a part that is a tensor by itself, in one put together with
    another, in the checksums. Padding carries nothing.
    """
    held = {"whole": Held((2, 3), (0, 0), (2, 3), "float32"), "cut": Held((8, 4), (2, 0), (4, 4), "float32")}
    parts = [[Part("whole", (0, 0), (2, 3)), Part("cut", (2, 0), (3, 4))], [Part("cut", (5, 0), (1, 4))]]
    buffers = []
    for mine in parts:
        buffer = torch.zeros(message_bytes(mine, held), dtype=torch.uint8)
        pack(mine, [torch.randn(part.shape) for part in mine], held, buffer)
        buffers.append(buffer)
    bucket = [Message(4 + i, tuple(mine)) for i, mine in enumerate(parts)]
    assert set(assemble(bucket, buffers, held)) == {"whole", "cut"}
    for number, buffer in enumerate(buffers):
        for byte in range(buffer.numel()):
            padding = number == 0 and 24 <= byte < 2 * ALIGNMENT
            buffer[byte] ^= 4
            if padding:
                assemble(bucket, buffers, held)
            else:
                with pytest.raises(
                    Corrupted,
                    match=rf"(whole|cut)\[\d:\d, \d:\d\] from trainer rank {4 + number} arrived with checksum",
                ):
                    assemble(bucket, buffers, held)
            buffer[byte] ^= 4
    assert buffers[1].numel() == 16 + HASH.itemsize


def test_the_hash_sees_one_bit_and_the_order() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    flipped = tensor.clone()
    flipped.view(torch.int32)[1, 1] ^= 1
    assert len({tensor_hash(tensor), tensor_hash(flipped), tensor_hash(tensor.t())}) == 3
    assert tensor_hash(tensor.t()) == tensor_hash(tensor.t().contiguous())


LAYOUTS = [
    (Layout(), RolloutLayout()),
    (Layout(tp=2, pp=2, ep=2, world=4), RolloutLayout(1, 2)),
    (Layout(pp=2, vpp=2, ep=2, world=4), RolloutLayout(2, 2)),
    (Layout(tp=2, etp=2, ep=2, world=8), RolloutLayout(1, 4)),
    (Layout(ep=4, world=4), RolloutLayout(2, 1)),
    (Layout(tp=2, cp=2, world=8), RolloutLayout(1, 2, ep=2)),
]


@pytest.mark.parametrize(("layout", "rollout"), LAYOUTS)
def test_slices_arrive_where_their_manifest_says(
    hf_config: dict[str, Any], layout: Layout, rollout: RolloutLayout
) -> None:
    """All trainer ranks' messages against all rollout ranks' manifests:
    every tensor, its slice, its bytes; bytes sent are bytes held.
    """
    weight_map = WeightMap(hf_config)
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in weight_map.hf_shapes.items()}
    wires: dict[tuple[int, int, int], torch.Tensor] = {}
    for rank in range(layout.world):
        params = []
        for param in weight_map.params(layout, layout.coord(rank)):
            local = torch.zeros(param.shape)
            for p in param.pieces:
                local[_box(p.start, p.shape)] = whole[p.hf][_box(p.hf_start, p.shape)]
            params.append((param, local))
        sender = Slices(weight_map, layout, rollout, torch.bfloat16, rank)
        for bucket in sender.buckets(params):
            for buffer, destination in bucket.messages:
                assert destination is not None
                wires[rank, destination - layout.world, bucket.number] = buffer.clone()
    payload = 0
    manifests = [manifest for engine in sender.manifests() for manifest in engine]
    for rank, manifest in enumerate(manifests):
        found: dict[str, torch.Tensor] = {}
        for number, messages in enumerate(manifest.buckets):
            buffers = [wires.pop((message.source, rank, number)) for message in messages]
            payload += sum(buffer.numel() for buffer in buffers)
            found |= assemble(messages, buffers, manifest.tensors)
        assert found.keys() == manifest.tensors.keys()
        for name, held in manifest.tensors.items():
            assert torch.equal(found[name], whole[name][_box(held.start, held.size)].bfloat16()), name
    assert not wires
    assert sender.bytes == sum(2 * torch.Size(held.size).numel() for m in manifests for held in m.tensors.values())


def _box(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape))
