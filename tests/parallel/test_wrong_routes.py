"""Wrong routes on one of 4 ranks: all 4 say which response is wrong and what was expected, all 4 exit, none hangs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.ranks import launch_ranks
from tools.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("wrong_routes") / "model")


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return launch_ranks(Path(__file__).with_name("wrong_routes.py"), 4, *arguments, timeout_s=300)


def test_every_rank_names_the_response_and_can_go_on(model: Path) -> None:
    done = launch(str(model))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(4):
        assert (
            f"rank {rank}: ok length layers top_k flat dtype too_high negative duplicate all_zero missing"
            in done.stdout
        )


def test_every_rank_exits(model: Path) -> None:
    done = launch(str(model), "duplicate")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("megarl: error: ")]
    assert len(lines) == 4 and len(set(lines)) == 1, done.stderr[-3000:]
    assert lines[0].startswith(
        "megarl: error: routes of response 1 to the prompt on line 3 ('digits 3'): row 5 names an expert twice"
    )
