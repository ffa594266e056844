"""tools/bench/peers.py measures everyone on one work."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench import peers_sides  # noqa: E402
from tools.bench.peers import LACKS, SIDES, means  # noqa: E402
from tools.bench.step import WARM_UP, configuration  # noqa: E402


def test_the_other_sides_do_the_work_of_the_reference_step(tmp_path: Path) -> None:
    config = configuration(tmp_path, "dp2", 1)
    assert config["batch"] == {"prompts": peers_sides.PROMPTS, "group": peers_sides.GROUP, "minibatches": 1}
    assert config["rollout"]["max_new_tokens"] == peers_sides.NEW_TOKENS
    assert config["rollout"]["max_prompt_tokens"] + peers_sides.NEW_TOKENS <= peers_sides.CONTEXT
    assert config["train"]["lr"] == peers_sides.LR
    assert set(LACKS) == set(SIDES)


def test_the_warm_up_is_left_out_and_the_worst_difference_kept() -> None:
    slow = {"rollout": 9.0, "sync": 9.0, "update": 9.0, "step": 9.0}
    rows = [slow] * WARM_UP + [
        {"rollout": 1.0, "sync": 2.0, "update": 3.0, "step": s, "off": s} for s in (4.0, 5.0, 9.0)
    ]
    assert means(rows) == {"rollout": 1.0, "sync": 2.0, "update": 3.0, "step": 6.0, "median step": 5.0, "off": 9.0}
