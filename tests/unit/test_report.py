"""What a run shows: rows that survive a crash, the live line, samples, curves, the page."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import UserError
from megarl.observe.metrics import MetricsLogger, read_metrics
from megarl.observe.progress import Progress, count, duration
from megarl.observe.samples import Sample, write_samples
from megarl.observe.worst import read_worst, write_worst
from megarl.report import curves
from megarl.report.html import last_eighth, learning_curve_svg, render, report
from megarl.report.panels import GROUPS
from megarl.train import rates


def every_key(step: int) -> dict[str, Any]:
    """A row with every key that the page shows."""
    row: dict[str, Any] = {"time/step_s": 4.0}
    for group in GROUPS:
        for panel in group.panels:
            row |= {key: 0.1 + 0.01 * step for key in panel.keys if key != "time/other_s"}
    return row | {"routing/layer_agreement": [1.0, 0.99]}


def test_rows_are_written_one_a_step_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.log(1, {"reward/mean": 0.5, "policy/entropy": math.nan, "routing/layer_agreement": [1.0, math.inf]})
    assert read_metrics(tmp_path) == [
        {"step": 1, "reward/mean": 0.5, "policy/entropy": None, "routing/layer_agreement": [1.0, None]}
    ]
    logger.close()


def test_resume_drops_later_rows_and_a_half_written_one(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    for step in range(1, 6):
        logger.log(step, {"reward/mean": step})
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    resumed = MetricsLogger(tmp_path, resumed_step=3)
    resumed.log(4, {"reward/mean": 40})
    resumed.close()
    assert [(row["step"], row["reward/mean"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


def test_a_new_run_starts_with_no_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    MetricsLogger(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_the_same_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = MetricsLogger(tmp_path, ["tensorboard"])
    logger.log(1, {"reward/mean": 0.25, "routing/layer_agreement": [1.0, 0.5], "policy/entropy": math.nan})
    logger.log(2, {"reward/mean": 0.75})
    logger.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]
    assert set(board.Tags()["scalars"]) == {"reward/mean", "routing/layer_agreement/0", "routing/layer_agreement/1"}


def test_the_live_line_rewrites_itself_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    plain, live = io.StringIO(), Terminal()
    row = {
        "reward/mean": 0.5,
        "mismatch/kl_k3": 1.2e-10,
        "routing/agree_rollout_old": 1.0,
        "throughput/tokens_per_s": 1900.0,
    }
    for stream in (plain, live):
        progress = Progress(20, stream)
        progress.update(1, row)
        progress.update(2, row | {"eval/mean_at_k": 0.25})
        progress.update(20, {"reward/mean": None})
    lines = plain.getvalue().splitlines()
    assert lines[0] == "step  1/20  reward 0.500  kl 1.2e-10  agree 1.0000  1.9k tok/s"  # one line tells no speed yet
    assert "eval mean@k 0.250" in lines[1] and lines[2] == "step 20/20  0:00 left"
    assert live.getvalue().count("\r") == 3 and live.getvalue().count("\n") == 2


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0, 61.4, 3723)] == ["0:00", "1:01", "1:02:03"]
    assert [count(n) for n in (950, 1234, 3.4e6)] == ["950", "1.2k", "3.4M"]


def test_samples_are_readable(tmp_path: Path) -> None:
    sample = Sample(prompt="sum 1 2", response="3;3", answer="3", reward=1.0, tokens=4, finish_reason="stop", version=8)
    text = write_samples(tmp_path, 7, [sample, sample]).read_text()
    assert (tmp_path / "rollouts" / "step_000007.txt").is_file()
    assert (
        "=== 2: reward 1, answer '3', 4 tokens, ended by stop, weights 8\n--- prompt\nsum 1 2\n--- response\n3;3\n"
        in text
    )


class Page(HTMLParser):
    """Collects what the tests ask of a page, and that its tags nest."""

    VOID = {"meta", "line", "circle", "polyline", "polygon", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_holds_every_panel_and_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {dir: <b>&}\n")
    text = render(str(tmp_path), [{"step": step, **every_key(step)} for step in range(1, 30)])
    page = Page(text)
    titles = {panel.title for group in GROUPS for panel in group.panels} | {group.title for group in GROUPS}
    assert titles <= set(page.words) and "run: {dir: <b>&}\n" in page.words
    assert not re.search(r"https?://|<link|<img|@import|url\(", text)
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    data = [json.loads(attrs["data-at"] or "") for tag, attrs in page.tags if tag == "figure" and "data-at" in attrs]
    assert all(len(values) == len(chart["steps"]) for chart in data for values in chart["values"])
    assert "nan" not in text.lower().replace("nanos", "")


def test_missing_keys_leave_their_panels_out(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": None, "loss/value": 0.1}]
    words = Page(render(str(tmp_path), rows)).words
    assert "Reward" in words and "Loss" in words and "Routing" not in words and "Entropy, nats" not in words
    Page(render(str(tmp_path), [{"step": 1}]))


@pytest.mark.parametrize(
    "values", [[0.0] * 5, [1.0] * 5, [None, 0.5, None, None, 2.0], [1e-12, 1e-3, 5.0, 0.0, -1.0], [1e9, 2e9, 0, 0, 1]]
)
@pytest.mark.parametrize("log", [False, True])
def test_charts_are_well_formed_and_inside_their_frame(values: list[float | None], log: bool) -> None:
    inside = curves.line_chart([1, 2, 3, 4, 5], [curves.Series("x", values)], log=log)
    root = ElementTree.fromstring(f"<svg>{inside}</svg>")
    for line in root.iter("polyline"):
        for x, y in (map(float, point.split(",")) for point in line.attrib["points"].split()):
            assert (
                curves.LEFT - 0.1 <= x <= curves.WIDTH and curves.TOP - 0.1 <= y <= curves.HEIGHT - curves.BOTTOM + 0.1
            )
    if inside:
        labels = [text.text for text in root.iter("text") if text.attrib["text-anchor"] == "end"]
        assert 1 <= len(labels) <= 8 and len(set(labels)) == len(labels), labels


def test_stacked_times_reach_their_sum() -> None:
    parts = [curves.Series("a", [1.0, 2.0]), curves.Series("b", [3.0, None])]
    root = ElementTree.fromstring(f"<svg>{curves.area_chart([1, 2], parts)}</svg>")
    tops = [[float(point.split(",")[1]) for point in area.attrib["points"].split()] for area in root.iter("polygon")]
    assert tops[1][0] == curves.TOP and tops[1][1] == tops[0][1]


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    rows = [{"step": step, **every_key(step)} for step in range(1, 5001)]
    assert len(render(str(tmp_path), rows)) < 1_500_000
    steps, thin = curves.thin(list(range(1, 5001)), [curves.Series("x", [float(i) for i in range(5000)])])
    assert len(steps) <= curves.MAX_POINTS and steps[-1] == 5000 and len(thin[0].values) == len(steps)


def test_a_heat_map_is_darkest_where_agreement_is_lowest() -> None:
    rows = [[1.0, 0.9] if step < 5 else [1.0, 0.8] for step in range(10)]
    root = ElementTree.fromstring(f"<svg>{curves.heat_map(list(range(10)), rows)}</svg>")
    cells = {path.attrib["fill-opacity"]: path.attrib["d"].count("M") for path in root.iter("path")}
    assert cells == {"0.50": 5, "1.00": 5}  # and the cells at 1 are bare paper
    assert "darkest: 0.8000" in [text.text for text in root.iter("text")]
    assert len(curves.heat_map(list(range(5000)), [[0.9 + step / 1e5] * 94 for step in range(5000)])) < 200_000


def test_several_runs_in_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("a", 8), ("b", 16)):
        logger = MetricsLogger(tmp_path / name)
        for step in range(1, steps + 1):
            logger.log(step, {**every_key(step), "reward/mean": step / steps})
        logger.close()
    assert report([str(tmp_path / "a"), str(tmp_path / "b")], out=str(tmp_path / "both.html")) == 0
    page = Page((tmp_path / "both.html").read_text())
    charts = [json.loads(attrs["data-at"] or "") for tag, attrs in page.tags if tag == "figure" and "data-at" in attrs]
    assert charts[0]["steps"] == list(range(1, 17)) and "a, mean" in page.words and "b, mean" in page.words
    reward_a, reward_b = charts[0]["values"][0], charts[0]["values"][2]
    assert reward_a[7] == 1.0 and reward_a[8] is None and reward_b[15] == 1.0
    assert f"report: {tmp_path}/both.html" in capsys.readouterr().out


def test_the_worst_tokens_come_with_their_text(tmp_path: Path) -> None:
    token = {"rollout": -1.0, "trainer": -1.5, "before": [1, 2], "token": [3], "after": [4]}
    decode = lambda tokens: "".join(f"<{t}>" for t in tokens)
    for step, differences in ((1, [9.0]), (2, [0.5, 0.25]), (2, [0.75]), (3, [0.1])):  # step 2 was done again
        write_worst(tmp_path, step, [token | {"difference": d} for d in differences], decode)
    assert [(row["step"], row["difference"]) for row in read_worst(tmp_path, 2, 5)] == [(2, 0.75), (3, 0.1)]
    words = Page(render(str(tmp_path), [{"step": 1, "reward/mean": 0.5}])).words
    assert "<1><2>" in words and "<3>" in words and "<4>" in words


def test_the_curve_in_the_terminal_rises_where_the_reward_does() -> None:
    text = curves.text_curve(list(range(1, 101)), [i / 100 for i in range(100)], mark="*")
    rows = [line.split("|")[1] for line in text.splitlines() if "|" in line]
    assert rows[0].rstrip().endswith("*") and rows[-1].startswith("*") and len(rows) == 12
    assert curves.text_curve([1], [0.5]).count("•") == 1 and curves.text_curve([1, 2], [None, None]) == ""


def test_report_prints_the_curve_and_writes_page_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = MetricsLogger(tmp_path)
    for step in range(1, 17):
        logger.log(step, {"reward/mean": step / 16})
    logger.close()
    assert report([str(tmp_path)], svg=str(tmp_path / "curve.svg")) == 0
    out = capsys.readouterr().out
    assert "reward/mean over the last eighth of the steps: 0.969" in out and f"report: {tmp_path}/report.html" in out
    root = ElementTree.parse(tmp_path / "curve.svg").getroot()
    assert (
        root.tag.endswith("svg") and learning_curve_svg(read_metrics(tmp_path)) == (tmp_path / "curve.svg").read_text()
    )
    assert last_eighth(read_metrics(tmp_path), "reward/std") is None


def test_report_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        report([str(tmp_path)])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no whole line yet"):
        report([str(tmp_path)])


def test_fault_16_the_page_makes_the_folder_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    assert report([str(tmp_path)], svg=str(tmp_path / "a" / "curve.svg"), out=str(tmp_path / "b" / "c" / "x.html")) == 0
    assert (tmp_path / "a" / "curve.svg").is_file() and (tmp_path / "b" / "c" / "x.html").is_file()
    with pytest.raises(UserError, match="metrics.jsonl/x.html' cannot be written: .*; give another file"):
        report([str(tmp_path)], out=str(tmp_path / "metrics.jsonl" / "x.html"))


def test_fault_22_rows_survive_whatever_a_crash_leaves(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = ['{"step": 1, "reward/mean": NaN}', '{"step": 2, "note": "a\u2028b"}', '{"step": 2, "note": "c\u2028d"}']
    path.write_bytes(
        "\n".join([*whole, "3", "null", '{"reward/mean": 1}', '{"step": "4"}']).encode() + b'\n{"a": "\xc3'
    )
    rows = read_metrics(tmp_path)
    assert (
        [row["step"] for row in rows] == [1, 2] and rows[1]["note"] == "c\u2028d" and math.isnan(rows[0]["reward/mean"])
    )


def test_a_line_of_worst_tokens_after_one_cut_short_is_whole(tmp_path: Path) -> None:
    token = {"difference": 1.0, "rollout": -1.0, "trainer": -2.0, "before": [1], "token": [2], "after": [3]}
    write_worst(tmp_path, 1, [token], str)
    path = tmp_path / "rollouts" / "worst.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "tok')
    write_worst(tmp_path, 2, [token], str)
    assert [row["step"] for row in read_worst(tmp_path, 1, 9)] == [1, 2]


def test_fault_22_a_step_without_update_trains_no_tokens() -> None:
    metrics: Any = {"response/tokens": 700.0, "time/update_s": 1e-4}
    assert "throughput/train_tokens_per_s" not in rates(metrics, 2.0)
    assert rates(metrics | {"optim/grad_norm": 1.0}, 2.0)["throughput/train_tokens_per_s"] == pytest.approx(7e6)
