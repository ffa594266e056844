"""What `megarl score` says of a wrong line of its input: one line that names file, line and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarl.commands.jsonl import encode_npy
from megarl.commands.score_input import check_rows, count_rows, read_rows
from megarl.config import Config, load_config
from megarl.errors import UserError
from megarl.weights.map.weight_map import WeightMap
from tests.parallel.wrong_routes import CASES, EXPERTS, LAYERS, ROWS, TOP_K
from tools.tiny_model import tiny_config

GOOD = np.random.default_rng(0).random((ROWS, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K].astype(np.uint8)


@pytest.fixture(scope="module")
def weight_map() -> WeightMap:
    return WeightMap(tiny_config().to_dict())


def read(folder: Path, weight_map: WeightMap, *lines: Any, mode: str = "R3") -> list[dict[str, Any]]:
    path = folder / "rows.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    config: Config = load_config(None, [f"replay.mode={mode}"])
    check_rows(path, config, weight_map)
    rows = list(read_rows(path, config, weight_map))
    assert len(rows) == count_rows(path)
    return rows


def row(routes: np.ndarray | None = GOOD, **changes: Any) -> dict[str, Any]:
    coded = {} if routes is None else {"routes": encode_npy(routes)}
    return {"tokens": list(range(3, 4 + ROWS)), "prompt_len": 2, **coded, **changes}


def test_good_lines(tmp_path: Path, weight_map: WeightMap) -> None:
    with_routes, without = read(tmp_path, weight_map, row(), "", row(None))
    np.testing.assert_array_equal(with_routes["routes"], GOOD)
    assert "routes" not in without


def test_fault_09_a_line_separator_inside_a_text_does_not_end_its_row(tmp_path: Path, weight_map: WeightMap) -> None:
    text = json.dumps(row(None, text="a\u2028b"), ensure_ascii=False)
    assert "\u2028" in text and len(read(tmp_path, weight_map, text, row(None))) == 2


@pytest.mark.parametrize("case", [case for case in CASES if case != "missing"])  # score routes such a line live
def test_wrong_routes(tmp_path: Path, weight_map: WeightMap, case: str) -> None:
    spoil, said = CASES[case]
    with pytest.raises(UserError) as error:
        read(tmp_path, weight_map, row(), row(spoil(GOOD)))
    assert (
        "rows.jsonl line 2: 'routes': " in str(error.value)
        and said in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting property name"),
        ({"prompt_len": 1}, "key 'tokens' is missing"),
        (row(tokens=[3]), "not a list of at least two token ids"),
        (row(tokens=[3, 32]), "outside the vocabulary of 32"),
        ({**row(None), "routes": "AAAA"}, "'routes': "),
    ],
)
def test_wrong_lines(tmp_path: Path, weight_map: WeightMap, line: Any, said: str) -> None:
    with pytest.raises(UserError, match="rows.jsonl line 1") as error:
        read(tmp_path, weight_map, line)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_routes_without_replay_and_no_rows(tmp_path: Path, weight_map: WeightMap) -> None:
    with pytest.raises(UserError, match="line 1 has routes, but replay.mode is none"):
        read(tmp_path, weight_map, row(), mode="none")
    with pytest.raises(UserError, match="holds no rows"):
        read(tmp_path, weight_map, "")


def test_a_replica_may_have_a_pack_without_responses() -> None:
    from megarl.commands.score import WholePack

    assert list(WholePack([], [], 8, {}).spans()) == []
    assert list(WholePack([4, 2], [0, 3], 8, {}).spans()) == [(4, slice(0, 3)), (2, slice(3, 8))]
