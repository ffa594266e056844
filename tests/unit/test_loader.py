"""The cold start's loaders: shards give back what was written, and the
thread and DALI give the same batches for a seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megarl.data import PromptStream
from megarl.data.images import MEAN, STD, image_batches, load_image_prompts
from megarl.data.loader import batches, planner
from megarl.data.shards import Shards, write_shards
from megarl.engine.batch import assign
from megarl.errors import UserError

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
    return list(batches(kind, plans(shards, rank, seed), shards, CPU))


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


def test_a_failure_while_reading_ahead_is_raised_where_the_batch_is_taken(shards: Shards) -> None:
    def broken():
        yield next(plans(shards, 0))
        raise OSError("disk")

    loaded = batches("torch", broken(), shards, CPU)
    next(loaded)
    with pytest.raises(OSError, match="disk"):
        next(loaded)


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int]) -> None:
    from PIL import Image

    Image.new("RGB", size, colour).save(path)


def test_pictures_and_their_prompts(tmp_path: Path) -> None:
    from tools.tiny_model import make_tokenizer

    colours = {"a.png": (255, 0, 128), "b.jpg": (40, 200, 90), "c.png": (0, 0, 0)}
    for n, (name, colour) in enumerate(colours.items()):
        picture(tmp_path / name, colour, (40 + 9 * n, 23))
    rows = [{"image": name, "prompt": f"{n}+1=", "answer": str(n + 1)} for n, name in enumerate(colours)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_image_prompts(tmp_path / "prompts.jsonl", make_tokenizer(), max_tokens=64, on_bad_line="error")
    assert [p.prompt.answer for p in prompts] == ["1", "2", "3"] and all(p.prompt.tokens for p in prompts)
    found = list(image_batches([p.image for p in prompts], batch=2, size=16, device=CPU))
    assert [tuple(x.shape) for x in found] == [(2, 3, 16, 16), (1, 3, 16, 16)]
    for pixels, colour in zip(torch.cat(found), colours.values()):
        wanted = (torch.tensor(colour) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        assert (pixels - wanted[:, None, None]).abs().max() < 0.05  # JPEG rounds colours
    left_red = np.zeros((32, 32, 3), np.uint8)
    left_red[:, :16, 0] = 255
    from PIL import Image

    Image.fromarray(left_red).save(tmp_path / "d.png")
    [[pixels]] = image_batches([tmp_path / "d.png"], batch=1, size=8, device=CPU, mean=(0, 0, 0), std=(1, 1, 1))
    assert pixels[0, :, :3].min() > 0.95 and pixels[0, :, 5:].max() < 0.05, "rows and columns are where they were"


def test_a_missing_picture_is_named_by_line(tmp_path: Path) -> None:
    from tools.tiny_model import make_tokenizer

    (tmp_path / "p.jsonl").write_text(json.dumps({"image": "no.png", "prompt": "1", "answer": "1"}) + "\n")
    with pytest.raises(UserError, match=r"p.jsonl line 1: key 'image' is 'no.png'"):
        load_image_prompts(tmp_path / "p.jsonl", make_tokenizer(), max_tokens=64, on_bad_line="error")


def test_a_broken_picture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture at all")
    with pytest.raises(UserError, match="cannot be decoded"):
        list(image_batches([tmp_path / "x.png"], batch=1, size=8, device=CPU))
