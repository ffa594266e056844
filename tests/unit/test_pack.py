"""Messages, manifests and how slices are put together, without a network."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.weights.map.layout import Layout
from megarl.weights.map.relations import HfSlice
from megarl.weights.map.weight_map import WeightMap
from megarl.weights.rect import Rect
from megarl.weights.reshard import hash as hash_module
from megarl.weights.reshard.hash import checksums, device_hash, tensor_hash
from megarl.weights.reshard.manifest import manifest_from, slice_inputs, whole_inputs, whole_manifest
from megarl.weights.reshard.message import Manifest, Message, TensorShard
from megarl.weights.reshard.outgoing import Slices, whole_buckets
from megarl.weights.reshard.pack import ALIGNMENT, HASH, Corrupted, assemble, message_bytes, pack
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


def described(named: dict[str, torch.Tensor]) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    return {name: tuple(t.shape) for name, t in named.items()}, {name: t.dtype for name, t in named.items()}


@pytest.mark.parametrize("bucket_bytes", [1, 64, 100, 10**6])
def test_what_is_packed_is_assembled(bucket_bytes: int) -> None:
    inputs = json.loads(json.dumps(whole_inputs(*described(tensors()), bucket_bytes)))
    manifest = manifest_from(inputs, 3)
    assert manifest == whole_manifest(*described(tensors()), bucket_bytes)
    found: dict[str, torch.Tensor] = {}
    for bucket, outgoing in zip(manifest.buckets, whole_buckets(tensors().items(), manifest), strict=True):
        ((buffer, rank),) = outgoing.messages
        assert rank is None and buffer.numel() == message_bytes(bucket[0].slices, manifest.dtypes)
        here = assemble(bucket, [buffer], manifest)
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

    next(whole_buckets(stream(), whole_manifest(*described(tensors()), 64)))
    assert len(taken) < len(tensors())


@pytest.mark.parametrize("on_device", [False, True])
def test_every_flipped_bit_of_a_message_is_noticed(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a slice that is a shard by itself, in one put together with
    another, in the checksums. Padding carries nothing.
    """
    shards = {
        "whole": TensorShard((2, 3), Rect.whole((2, 3)), torch.float32),
        "cut": TensorShard((8, 4), Rect((2, 0), (4, 4)), torch.float32),
    }
    bucket = (
        Message(0, 4, 0, (HfSlice("whole", Rect.whole((2, 3))), HfSlice("cut", Rect((2, 0), (3, 4))))),
        Message(0, 5, 0, (HfSlice("cut", Rect((5, 0), (1, 4))),)),
    )
    manifest = Manifest(shards, (bucket,))
    monkeypatch.setattr(hash_module, "on_device", lambda tensor: on_device)
    buffers = []
    for message in bucket:
        buffer = torch.zeros(message_bytes(message.slices, manifest.dtypes), dtype=torch.uint8)
        pack(message.slices, [torch.randn(each.rect.size) for each in message.slices], manifest.dtypes, buffer)
        buffers.append(buffer)
    assert set(assemble(bucket, buffers, manifest)) == {"whole", "cut"}
    for number, buffer in enumerate(buffers):
        for byte in range(buffer.numel()):
            padding = number == 0 and 24 <= byte < 2 * ALIGNMENT
            buffer[byte] ^= 4
            if padding:
                assemble(bucket, buffers, manifest)
            else:
                with pytest.raises(
                    Corrupted,
                    match=rf"(whole|cut)\[\d:\d, \d:\d\] from trainer rank {4 + number} arrived with checksum",
                ):
                    assemble(bucket, buffers, manifest)
            buffer[byte] ^= 4
    assert buffers[1].numel() == 16 + HASH.itemsize


def test_the_hash_sees_one_bit_and_the_order() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    flipped = tensor.clone()
    flipped.view(torch.int32)[1, 1] ^= 1
    assert len({tensor_hash(tensor), tensor_hash(flipped), tensor_hash(tensor.t())}) == 3
    assert tensor_hash(tensor.t()) == tensor_hash(tensor.t().contiguous())


def test_the_hash_of_a_device_needs_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whatever it is cut into and wherever it lies; a change of one word, or of two, changes it."""
    raw = torch.randint(256, (8 * 37 + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, seen = int(device_hash(raw)), set()
    moved = torch.cat([torch.zeros(3, dtype=torch.uint8), raw])[3:]
    monkeypatch.setattr(hash_module, "CHUNK", 5)
    assert int(device_hash(raw)) == int(device_hash(moved)) == whole
    for bit in range(8 * raw.numel()):
        changed = raw.clone()
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(int(device_hash(changed)))
    assert len(seen | {whole}) == 8 * raw.numel() + 1
    swapped = torch.cat([raw[8:16], raw[:8], raw[16:]])
    longer = torch.cat([raw, torch.zeros(1, dtype=torch.uint8)])
    assert len({whole, int(device_hash(swapped)), int(device_hash(longer))}) == 3
    device_hash(torch.zeros(1000, device="meta"))  # a look at a value would raise: this one has none


def test_hashes_of_a_bucket_of_a_device_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of one size go together, as many as CHUNK words allow: equal experts need no call for each."""
    generator = torch.Generator().manual_seed(0)
    sizes = [24, 5, 24, 8, 5, 24, 24, 200, 5]
    tensors = [torch.randint(256, (n,), dtype=torch.uint8, generator=generator) for n in sizes]
    tensors += [torch.randn(4, 6, generator=generator).t(), torch.randn(6, 4, generator=generator)]
    monkeypatch.setattr(hash_module, "on_device", lambda tensor: True)
    for chunk in (2**24, 7):
        monkeypatch.setattr(hash_module, "CHUNK", chunk)
        assert checksums(tensors).tolist() == [int(device_hash(tensor)) for tensor in tensors]
    calls: list[int] = []
    monkeypatch.setattr(hash_module, "CHUNK", 2**24)
    monkeypatch.setattr(
        hash_module, "_device_hashes", lambda part: calls.append(len(part)) or torch.zeros(len(part), dtype=torch.int64)
    )
    checksums([torch.zeros(64) for _ in range(100)])
    assert calls == [100]


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
                local[p.local.slices] = whole[p.hf_name][p.rect.slices]
            params.append((param, local))
        sender = Slices(weight_map, layout, rollout, torch.bfloat16, rank)
        for bucket in sender.buckets(params):
            for buffer, destination in bucket.messages:
                assert destination is not None
                wires[rank, destination - layout.world, bucket.number] = buffer.clone()
    payload = 0
    inputs = json.loads(json.dumps(sender.manifest_inputs))
    manifests = [manifest_from(inputs, rank) for rank in range(rollout.world)]
    for rank, manifest in enumerate(manifests):
        found: dict[str, torch.Tensor] = {}
        for number, messages in enumerate(manifest.buckets):
            buffers = [wires.pop((message.source, rank, number)) for message in messages]
            payload += sum(buffer.numel() for buffer in buffers)
            found |= assemble(messages, buffers, manifest)
        assert found.keys() == manifest.shards.keys()
        for name, shard in manifest.shards.items():
            assert torch.equal(found[name], whole[name][shard.rect.slices].bfloat16()), name
    assert not wires
    assert sender.bytes == sum(shard.nbytes for m in manifests for shard in m.shards.values())


def test_nobody_lists_what_is_anothers_at_size() -> None:
    """Qwen3-235B-A22B from 1,024 ranks: what rank 0 tells the servers does not grow with them, and a worker's manifest
    of 18,000 tensors takes what its plan takes. Rank 0 once listed every worker's.
    """
    folder = Path(__file__).resolve().parents[2] / "examples/multi_node/models/Qwen3-235B-A22B"
    weight_map = WeightMap(json.loads((folder / "config.json").read_text()))
    layout = Layout(tp=4, pp=8, ep=16, world=1024, first_stage_layers=11, last_stage_layers=11)
    few, many = (slice_inputs(weight_map, layout, RolloutLayout(engines=n, tp=8), torch.bfloat16) for n in (1, 1000))
    assert len(json.dumps(many)) <= len(json.dumps(few)) + 3 < 2048
    inputs = slice_inputs(weight_map, layout, RolloutLayout(engines=32, tp=8), torch.bfloat16)
    tracemalloc.start()
    try:
        manifest = manifest_from(inputs, 3)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(manifest.shards) == len(weight_map.hf_shapes)
    assert held < 64 * 2**20 and peak < 256 * 2**20
