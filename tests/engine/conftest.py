"""Two checkpoints, and one server for all tests that leave it usable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.engine.support import Rollout, supervised
from tools.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape and different weights."""
    folder = tmp_path_factory.mktemp("models")
    return make_tiny_model(folder / "a", seed=0), make_tiny_model(folder / "b", seed=1)


@pytest.fixture(scope="session")
def rollout(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rollout]:
    """One server for all tests that leave it usable. It starts with the first checkpoint; tests load what they need."""
    with supervised(checkpoints[0], tmp_path_factory.mktemp("run")) as one:
        yield one
