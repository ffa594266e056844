"""docs/extending.md, run as it stands: its files are written, its blocks run in order, its settings are read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from megarl.config import Config, load_config
from megarl.engine.parallel import destroy_parallel
from megarl.refusals import files, work
from megarl.refusals.case import Case
from megarl.weights.map import weight_map

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
BLOCK = re.compile(r"^```(python|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weight_map, "FAMILIES", dict(weight_map.FAMILIES))
    monkeypatch.setattr(sys, "path", [*sys.path])
    page, ran, settings = PAGE.read_text(), {"__name__": "page"}, []
    try:
        for kind, block in BLOCK.findall(page):
            line = page[: page.index(block)].count("\n") + 1
            if kind == "yaml":
                settings.append(block)
            elif name := re.match(r"# (\w+\.py)\n", block):
                (tmp_path / name[1]).write_text(block)
            else:  # the page's line numbers, for a traceback
                exec(compile("\n" * (line - 1) + block, str(PAGE), "exec"), ran)
        refuse_nothing(tmp_path, settings)
    finally:
        destroy_parallel()
        for name in ("my_reward", "my_objective", "my_logger", "dots1"):
            sys.modules.pop(name, None)
    assert len(settings) == 3 and "engine" in ran


def refuse_nothing(folder: Path, settings: list[str]) -> None:
    """The settings are keys that exist, and what they name passes the checks before a run."""
    tree = {key: value for block in settings for key, value in yaml.safe_load(block).items()}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    config: Config = load_config(folder / "run.yaml")
    case = Case("train", config, 1, {})
    assert config.objective.clip == "my_objective.binary_kl" and config.data.reward == "my_reward.last_number"
    assert [check(case) for check in (work.objective, files.reward, files.loggers)] == [None, None, None]
