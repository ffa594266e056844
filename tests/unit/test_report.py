"""What a run shows: rows that survive a crash, the live line, samples, curves, the page."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from megarl.errors import UserError
from megarl.loop.reduce import rates
from megarl.observe import progress
from megarl.observe.loggers import TensorBoard
from megarl.observe.metrics import MetricsLogger, read_metrics
from megarl.observe.progress import Progress, count, duration
from megarl.observe.samples import Sample, write_samples
from megarl.observe.worst import read_worst, write_worst
from megarl.report import curves
from megarl.report.html import last_eighth, learning_curve_svg, refuse_target, report


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


def test_tensorboard_takes_a_step_in_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the step does not wait until it is written."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    calls: list[str] = []
    logger = TensorBoard(tmp_path, {}, 0)
    with monkeypatch.context() as patched:
        for name in ("add_event", "flush"):
            patched.setattr(EventFileWriter, name, lambda *args, name=name: calls.append(name))
        logger.log(1, {f"scalar/{i}": float(i) for i in range(30)})
    logger.close()
    assert calls == ["add_event"]


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
        shown = Progress(20, stream)
        shown.update(1, row)
        shown.update(2, row | {"eval/mean_at_k": 0.25})
        shown.update(20, {"reward/mean": None})
    lines = plain.getvalue().splitlines()
    assert lines[0] == "step  1/20  reward 0.500  kl 1.2e-10  agree 1.0000  1.9k tok/s"  # one line tells no speed yet
    assert "eval mean@k 0.250" in lines[1] and lines[2] == "step 20/20  0:00 left"
    written = live.getvalue()
    assert len(lines) == 3 and written.count("\n") == 3  # two lines stay, and the bar's own goes before the last
    assert "\x1b[2K" in written and all(line.split("  ")[0] in written for line in lines)
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is back, whatever ends the process


def test_fault_17_rows_that_are_done_are_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no terminal is there to see a bar: a line every ten seconds, and the last."""
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    stream = io.StringIO()
    rows = progress.Rows("scored", 8, stream)
    for _ in range(8):
        rows.add(1)
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "scored 8/8  0:00 left" and 2 <= len(lines) < 8


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0, 61.4, 3723)] == ["0:00", "1:01", "1:02:03"]
    assert [count(n) for n in (950, 1234, 3.4e6)] == ["950", "1.2k", "3.4M"]


def test_samples_are_readable(tmp_path: Path) -> None:
    sample = Sample(
        prompt="sum 1 2",
        tokens=[3, 9, 3, 0],
        answer="3",
        reward=1.0,
        finish_reason="stop",
        version=8,
        rollout=[-1.0] * 4,
        number=0,
    )
    text = write_samples(
        tmp_path, 7, [sample, sample], lambda tokens: "3;3" if tokens == [3, 9, 3, 0] else ""
    ).read_text()
    assert (tmp_path / "rollouts" / "step_000007.txt").is_file()
    assert (
        "=== 2: reward 1, answer '3', 4 tokens, ended by stop, weights 8\n--- prompt\nsum 1 2\n--- response\n3;3\n"
        in text
    )


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
        logger.log(step, {"reward/mean": step / 16, "time/step_s": float(step)})
    logger.close()
    assert report([str(tmp_path)], svg=str(tmp_path / "curve.svg")) == 0
    out = capsys.readouterr().out
    assert "reward/mean over the last eighth of the steps: 0.969 (over the first: 0.094)" in out
    assert "seconds a step, median: 8.50" in out and f"report: {tmp_path}/report.html" in out
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


def test_a_file_that_cannot_be_looked_at_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (page := tmp_path / "page").touch()
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match="page' is there and cannot be read: Permission denied; give another file"):
        refuse_target(page)


@pytest.mark.parametrize("option", ["out", "svg"])
def test_a_page_is_written_over_pages_alone(option: str, tmp_path: Path) -> None:
    """Of a run whose rows are gone nothing is left to report."""
    rows, page = tmp_path / "metrics.jsonl", tmp_path / "page"
    rows.write_text('{"step": 1, "reward/mean": 0.5}\n')
    with pytest.raises(UserError, match="metrics.jsonl' is there and is no page or picture; give another file"):
        report([str(tmp_path)], **{option: str(rows)})
    assert rows.read_text() == '{"step": 1, "reward/mean": 0.5}\n' and not (tmp_path / "report.html").exists()
    page.touch()
    for _ in range(2):
        assert report([str(tmp_path)], **{option: str(page)}) == 0


@pytest.mark.parametrize("where", [{"out": "."}, {"svg": "."}, {"out": ".."}, {"svg": ""}, {"out": "/"}])
def test_a_folder_in_place_of_a_page_or_a_picture(
    where: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    Path("metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    with pytest.raises(UserError, match="^'[./]+' is a folder; give a file$"):
        report([str(tmp_path / "run")], **where)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("reward", [-1e8, 1e8, -1e-12, -1e300])
def test_a_constant_reward_of_any_size_has_a_curve_and_a_page(reward: float, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "reward/mean": {reward}}}\n' for i in (1, 2, 3)))
    assert report([str(tmp_path)], svg=str(tmp_path / "curve.svg")) == 0
    assert curves.text_curve([1, 2, 3], [reward] * 3, mark="*").count("*") == 3


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
