"""The cold start's loaders: shards give back what was written, and the
thread and DALI give the same batches for a seed.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from megarl.data import PromptStream
from megarl.data.loader import batches, planner
from megarl.data.shards import Shards, write_shards
from megarl.engine.batch import assign

CPU = torch.device("cpu")


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    rng = random.Random(0)
    data = [([rng.randrange(30) for _ in range(rng.randrange(2, 40))], 1) for _ in range(25)]
    write_shards(data, tmp_path / "shards", shard_tokens=100)
    found = Shards(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("tokens_*.npy"))) > 3, "several shards"
    assert [(found.tokens(i).tolist(), found.prompt_len(i)) for i in range(len(found))] == data
    return found


def plans(shards: Shards, rank: int, seed: int = 3):
    """Steps of 6 demonstrations over two replicas, packs of at most 48 rows: as
    megarl/commands/sft.py asks for them.
    """
    stream = PromptStream(len(shards), seed)
    return planner(stream.next, 6, 9, shards, lambda rows: assign(rows, 2, 48)[rank])


def read(kind: str, shards: Shards, rank: int, seed: int = 3):
    return list(batches(kind, plans(shards, rank, seed), shards, CPU, most_packs=6))


def test_both_loaders_give_identical_batches(shards: Shards) -> None:
    seen = []
    for rank in (0, 1):
        ours, dalis = read("torch", shards, rank), read("dali", shards, rank)
        assert len(ours) == len(dalis) == 9
        for (plan, tokens), (other, others) in zip(ours, dalis):
            assert plan == other
            assert (
                [len(pack) for pack in tokens] == [len(pack) for pack in plan.packs] == [len(pack) for pack in others]
            )
            for i, a, b in zip(sum(plan.packs, []), sum(tokens, []), sum(others, [])):
                assert (
                    a.dtype == b.dtype == torch.int64 and torch.equal(a, b) and a.tolist() == shards.tokens(i).tolist()
                )
        seen.append([sorted(sum(plan.packs, [])) for plan, _ in ours])
    assert all(len(a) + len(b) == 6 and not set(a) & set(b) for a, b in zip(*seen)), (
        "each demonstration goes to one replica"
    )
    assert [plan for plan, _ in read("torch", shards, 0, seed=4)] != [plan for plan, _ in ours]


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_a_step_may_have_more_packs_than_there_are_demonstrations(tmp_path: Path, kind: str) -> None:
    write_shards([([1, 2, 3], 1), ([4, 5, 6], 1)], tmp_path / "shards")
    few = Shards(tmp_path / "shards")
    steps = planner(PromptStream(2, 0).next, 3, 2, few, lambda rows: assign(rows, 1, 2, multiple=4)[0])
    loaded = list(batches(kind, steps, few, CPU, most_packs=4))
    assert [[len(pack) for pack in tokens] for _, tokens in loaded] == [[1, 1, 1, 0]] * 2


def test_a_failure_while_reading_ahead_is_raised_where_the_batch_is_taken(shards: Shards) -> None:
    def broken():
        yield next(plans(shards, 0))
        raise OSError("disk")

    loaded = batches("torch", broken(), shards, CPU, most_packs=6)
    next(loaded)
    with pytest.raises(OSError, match="disk"):
        next(loaded)
