from __future__ import annotations

import pytest
import torch

from megarl.weights.hash import tensor_hash
from megarl.weights.pack import ALIGNMENT, buckets, buffer_bytes, unpack


def tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    odd = torch.randn(3, 5, generator=generator)
    return [
        ("a", odd),
        ("transposed", odd.t()),
        ("bf16", odd.bfloat16()),
        ("scalar", torch.tensor(2.5)),
        ("bytes", torch.arange(7, dtype=torch.uint8)),
        ("empty", torch.empty(0, 4)),
        ("long", torch.arange(5)),
        ("fp8", odd.to(torch.float8_e4m3fn)),
    ]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 100, 10**6])
def test_what_is_packed_is_unpacked(bucket_bytes: int) -> None:
    packed = list(buckets(tensors(), bucket_bytes))
    found = [
        (name, tensor, sent)
        for bucket in packed
        for (name, tensor), sent in zip(unpack(bucket.buffer, bucket.names, bucket.dtypes, bucket.shapes), bucket.hashes)
    ]
    assert [name for name, _, _ in found] == [name for name, _ in tensors()]
    for (_, tensor, sent), (_, original) in zip(found, tensors()):
        assert tensor.dtype == original.dtype and tensor.shape == original.shape
        assert tensor_hash(tensor) == tensor_hash(original) == sent
    for bucket in packed:
        assert bucket.buffer.numel() == buffer_bytes(bucket.dtypes, bucket.shapes) and bucket.buffer.numel() % ALIGNMENT == 0
        assert len(bucket.names) == 1 or bucket.buffer.numel() <= bucket_bytes
    assert len(packed) == {1: 8, 10**6: 1}.get(bucket_bytes, len(packed))


def test_unpacked_tensors_are_views() -> None:
    (bucket,) = buckets(tensors(), 10**6)
    for _, tensor in unpack(bucket.buffer, bucket.names, bucket.dtypes, bucket.shapes):
        assert tensor.untyped_storage().data_ptr() == bucket.buffer.untyped_storage().data_ptr()


def test_a_stream_is_read_bucket_by_bucket() -> None:
    taken = []

    def stream():
        for name, tensor in tensors():
            taken.append(name)
            yield name, tensor

    next(buckets(stream(), 64))
    assert len(taken) < len(tensors())


def test_the_hash_sees_one_bit_and_the_order() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    flipped = tensor.clone()
    flipped.view(torch.int32)[1, 1] ^= 1
    assert len({tensor_hash(tensor), tensor_hash(flipped), tensor_hash(tensor.t())}) == 3
    assert tensor_hash(tensor.t()) == tensor_hash(tensor.t().contiguous())
