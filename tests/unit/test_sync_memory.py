"""What a weight sync keeps on a trainer's device: megarl plan's figure against the buffers of real senders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarl.config import load_config
from megarl.estimate.cluster import Hosts, plan_run
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap, load_hf_config
from megarl.weights.reshard import plan
from megarl.weights.reshard.outgoing import Slices
from megarl.weights.reshard.rollout_layout import RolloutLayout


def kept(weight_map: WeightMap, layout: Layout, rollout: RolloutLayout, rank: int) -> int:
    """Bytes of the buffers of a second sync: those that the first one left."""
    params = [(param, torch.zeros(param.shape)) for param in weight_map.params(layout, layout.coord(rank))]
    sender = Slices(weight_map, layout, rollout, torch.bfloat16, rank)
    for _ in sender.buckets(params):
        pass
    storages = {}
    for bucket in sender.buckets(params):
        for buffer, _ in bucket.messages:
            storages[buffer.data_ptr()] = buffer.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("world", "overrides", "rollout"),
    [
        (1, ["parallel={}"], RolloutLayout(3, 1)),
        (8, [], RolloutLayout(2, 2)),
        (4, ["parallel={pp: 2}"], RolloutLayout(1, 2)),
        (8, ["parallel={tp: 2, etp: 2, ep: 2}"], RolloutLayout(1, 4, ep=4)),
    ],
)
def test_a_sync_keeps_what_the_plan_counts(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, world: int, overrides: list[str], rollout: RolloutLayout
) -> None:
    monkeypatch.setattr(plan, "LEAST_BUCKET", 30_000)  # of this model several
    engines = [f"rollout.engines={rollout.engines}", f"rollout.tp={rollout.tp}"]
    options = ["engine.dtype=bfloat16", *engines, *overrides]
    config = load_config(run_yaml, options)
    layout = Layout(**config.parallel.model_dump(), world=world)
    weight_map = WeightMap(load_hf_config(config.model.path))
    most = [0] * layout.pp
    for rank in range(world):
        stage = layout.coord(rank).pp
        most[stage] = max(most[stage], kept(weight_map, layout, rollout, rank))
    hosts, broadcast = Hosts(8, 50.0), load_config(run_yaml, ["sync.transport=broadcast", *options])
    stages, without = (plan_run(each, world, rollout.ep, hosts)["train"]["stages"] for each in (config, broadcast))
    assert [stage["sync"] for stage in stages] == pytest.approx(most, rel=0.01)  # padding and checksums are not counted
    assert [a["total"] - b["total"] for a, b in zip(stages, without, strict=True)] == [a["sync"] for a in stages]
    assert not any(stage["sync"] for stage in without)  # whole tensors are packed anew each time
