"""The page of `megarl report` as text: what stands in it for which runs; tests/browser looks at it drawn."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import UserError
from megarl.observe.metrics import MetricsLogger
from megarl.observe.samples import Sample
from megarl.observe.token_samples import TOKENS, pieces, read_token_samples, write_token_samples
from megarl.observe.worst import read_worst, write_worst
from megarl.report.charts import MAX_POINTS, run_charts
from megarl.report.html import load_runs, render, report
from megarl.report.live import LivePage, page_of_a_run_that_ended
from megarl.report.page import ASSETS
from megarl.report.panels import GROUPS
from tests.html_page import Page
from tests.synthetic_runs import sample, write_run

PANELS = [panel for group in GROUPS for panel in group.panels]


def every_key(step: int) -> dict[str, Any]:
    """A row with every key that the page shows."""
    row: dict[str, Any] = {"time/step_s": 4.0}
    for panel in PANELS:
        row |= {key: 0.1 + 0.01 * step for key in panel.keys if key != "time/other_s"}
    return row | {"routing/layer_agreement": [1.0, 0.99]}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def page_of(*folders: Path) -> Page:
    return Page(render(load_runs([str(folder) for folder in folders]), folders[0]))


def chart(page: Page, name: str) -> dict[str, Any]:
    place = next(attrs["data-chart"] for tag, attrs in page.tags if tag == "figure" and attrs["id"] == name)
    return page.data["charts"][int(place or 0)]


def test_the_page_holds_every_panel_and_needs_nothing_else(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"step": step, **every_key(step)} for step in range(1, 30)])
    (tmp_path / "config.yaml").write_text("run: {dir: <b>&}\n")
    page = page_of(tmp_path)
    titles = {panel.title for panel in PANELS} | {group.title for group in GROUPS}
    assert titles <= set(page.words) and "run: {dir: <b>&}\n" in page.words
    logged = {key for panel in PANELS for key in panel.keys} - {"time/other_s"}
    assert logged <= set(page.words), "metric keys stand under the titles"
    assert not [tag for tag, attrs in page.tags if tag in ("link", "img") or "src" in attrs]
    assert all((attrs["href"] or "").startswith(("#", "../")) for tag, attrs in page.tags if tag == "a")
    text = render(load_runs([str(tmp_path)]), tmp_path)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|import\(", text)
    assert "uPlot (v1.6.32)" in text and "width=device-width" in text and "prefers-color-scheme:dark" in text
    assert (ASSETS / "uplot" / "LICENSE").read_text().startswith("The MIT License")
    for drawn in page.data["charts"]:
        assert all(len(line["values"]) == len(drawn["x"] or page.data["steps"]) for line in drawn["lines"])


def test_missing_keys_leave_their_panels_out(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": None, "loss/value": 0.1}]
    words = page_of(write_rows(tmp_path, rows)).words
    assert "Reward" in words and "Loss" in words and "Routing" not in words and "Entropy, nats" not in words


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1}],
        [{"step": 1, "reward/mean": 0.5}],
        [{"step": s, **{key: math.nan for p in PANELS for key in p.keys}} for s in (1, 2)],
        [{"step": s, **{key: None for p in PANELS for key in p.keys}} for s in (1, 2)],
        [{"step": s, "reward/mean": "high", "mismatch/kl_k3": [1], "routing/layer_agreement": 3} for s in range(40)],
        [{"step": 1, "routing/layer_agreement": []}, {"step": 9, "routing/layer_agreement": [1.0, None]}],
        [{"step": 1, "routing/layer_agreement": [1.0]}, {"step": 2, "routing/layer_agreement": [1.0, 0.5]}],
        [{"step": s, "reward/mean": math.inf, "mismatch/kl_k3": 1e300} for s in range(-2, 3)],
    ],
)
def test_fault_22_no_row_is_too_odd_for_a_page(
    tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, rows)
    (tmp_path / "config.yaml").write_text("rollout: [1\n")  # not YAML
    assert report([str(tmp_path)]) == 0 and "verdict: " in capsys.readouterr().out
    json.dumps(Page((tmp_path / "report.html").read_text()).data, allow_nan=False)


def test_fault_22_a_run_of_another_version_shows_what_this_one_does_not_know(tmp_path: Path) -> None:
    rows = [{"step": step, "reward/mean": 0.5, "agents/turns": step} for step in (1, 2)]
    (write_rows(tmp_path, rows) / "config.yaml").write_text("rollout: fast\nmodel: {was: here}\n")
    page = page_of(tmp_path)
    assert chart(page, "agents-turns")["lines"][0]["values"] == [1, 2] and "Others" in page.words


def test_fault_22_charts_of_zero_are_folded_away_and_a_step_without_update_has_no_speed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": s, "reward/mean": 0.5, "staleness/clip_frac_pos": 0.0, "throughput/train_tokens_per_s": 7e6}
        for s in (1, 2)
    ]
    rows[0] |= {"optim/grad_norm": 1.0, "throughput/train_tokens_per_s": 900.0}
    page = page_of(write_rows(tmp_path, rows))
    assert "0 at every step: Clipped tokens" in page.words
    assert chart(page, "throughput-train-tokens-per-s")["lines"][0]["values"] == [900.0, None]


def test_fault_22_the_page_opens_with_its_verdict_and_shades_what_is_out_of_line(tmp_path: Path) -> None:
    sound, collapsed = write_run(tmp_path / "sound"), write_run(tmp_path / "collapsed", collapse_at=120)
    assert "Healthy" in page_of(sound).words
    page = page_of(collapsed)
    words = page.text
    assert words.index("curves are out of line") < words.index("Learning")
    assert re.search(r"truncated 0\.4\d* \(above 0\.3\) and rising", words)
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert "#response-truncated-frac" in links and {link[1:] for link in links if link} <= set(page.ids("figure"))
    assert chart(page, "response-truncated-frac")["limits"] == [[0.3, "above"], [0.1, "above"]]
    assert "out of line: above 0.3; above 0.1 and rising" in page.words
    assert chart(page, "mismatch-kl-k3")["log"] and chart(page, "staleness-kl-k3")["log"]
    assert chart(page, "mismatch-kl-k3")["limits"] == [[5e-3, "above"], [1e-3, "above"]]  # bfloat16's


def test_a_page_in_a_checkout_links_to_the_section(tmp_path: Path) -> None:
    runs = load_runs([str(write_run(tmp_path / "run", collapse_at=120))])
    place = ASSETS.parents[2] / "runs" / "some_run"
    links = [attrs["href"] or "" for tag, attrs in Page(render(runs, place)).tags if tag == "a"]
    assert "../../docs/stability.md#4-entropy-and-length" in links


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"step": step, **every_key(step)} for step in range(1, 5003)])
    runs = load_runs([str(tmp_path)])
    assert len(render(runs, tmp_path)) < 1_500_000
    steps, groups = run_charts(runs)
    assert len(steps) <= MAX_POINTS and steps[-1] == 5002 and steps[0] == 6
    charts = {drawn.name: drawn for _, members in groups for drawn in members}
    (mean,), (largest,) = charts["loss-value"].lines, charts["mismatch-abs-logprob-diff-max"].lines
    assert len(mean.values) == len(largest.values) == len(steps)
    assert mean.values[0] == pytest.approx(0.135) and largest.values[0] == pytest.approx(0.16)  # of steps 1 to 6
    assert len(charts["routing-layer-agreement"].rows) <= 200


def test_several_runs_in_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("a", 8), ("b", 16)):
        logger = MetricsLogger(tmp_path / name)
        for step in range(1, steps + 1):
            logger.log(step, {**every_key(step), "reward/mean": step / steps})
        logger.close()
        (tmp_path / name / "config.yaml").write_text(f"train: {{lr: 1.0e-{steps}, steps: 9}}\nrun: {{dir: {name}}}\n")
    assert report([str(tmp_path / "a"), str(tmp_path / "b")], out=str(tmp_path / "both.html")) == 0
    page = Page((tmp_path / "both.html").read_text())
    reward = chart(page, "reward-mean")
    assert page.data["steps"] == list(range(1, 17)) and page.data["runs"] == ["a", "b"]
    assert [line["name"] for line in reward["lines"]] == ["a, mean", "a, pass@G", "b, mean", "b, pass@G"]
    assert reward["lines"][0]["values"][7:9] == [1.0, None] and reward["lines"][2]["values"][15] == 1.0
    assert [line["run"] for line in reward["lines"]] == [0, 0, 1, 1]
    assert chart(page, "time-step-s")["kind"] == "line" and "routing-layer-agreement" not in page.ids("figure")
    cells = page.words[page.words.index("Differences of configuration") :]
    assert cells[cells.index("train.lr") :][:3] == ["train.lr", "1e-08", "1e-16"]
    assert "train.steps" not in page.words and "run.dir" not in page.words
    assert f"report: {tmp_path}/both.html" in capsys.readouterr().out


def test_one_run_named_twice_is_one_run(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"step": 1, "reward/mean": 0.5}])
    assert len(load_runs([str(tmp_path), str(tmp_path)])) == 1


def test_the_worst_tokens_come_with_their_text(tmp_path: Path) -> None:
    token = {"rollout": -1.0, "trainer": -1.5, "before": [1, 2], "token": [3], "after": [4]}
    decode = lambda tokens: "".join(f"<{t}>" for t in tokens)
    for step, differences in ((1, [9.0]), (2, [0.5, 0.25]), (2, [0.75]), (3, [0.1])):  # step 2 was done again
        write_worst(tmp_path, step, [token | {"difference": d} for d in differences], decode)
    assert [(row["step"], row["difference"]) for row in read_worst(tmp_path, 2, 5)] == [(2, 0.75), (3, 0.1)]
    words = page_of(write_rows(tmp_path, [{"step": 1, "reward/mean": 0.5}])).words
    assert "<1><2>" in words and "<3>" in words and "<4>" in words


def test_fault_22_samples_come_token_by_token(tmp_path: Path) -> None:
    """Characters cut in bytes are joined, U+2028 and a closing script element are text, a cut file is passed over."""
    alphabet = ["a", " b", "\u2028", "</script>", b"\xe2", b"\x82", b"\xac"]

    def decode(tokens: list[int]) -> str:
        parts = [part if isinstance(part := alphabet[t], bytes) else part.encode() for t in tokens]
        return b"".join(parts).decode(errors="replace").removeprefix(" ")

    assert pieces([1, 0, 4, 5, 6, 2], decode) == ([" b", "a", "€", "\u2028"], [1, 1, 3, 1])
    tokens = [1, 0, 4, 5, 6, 2, 3] + [0] * TOKENS
    old = [-1.0, -1.25, -1.0, -2.0, -1.0, -1.0, -1.0] + [-1.0] * TOKENS
    first_one = Sample("p", tokens, "x", 1.0, "length", 3, [-1.0] * len(tokens), number=5)
    second_one = Sample("p", [0], "x", math.nan, "stop", 3, [-2.0], number=8)
    write_token_samples(tmp_path, 7, [first_one, second_one], {5: old}, decode)
    (tmp_path / "rollouts" / "step_000003.json").write_text('{"step": 3, "samp')
    first, second = read_token_samples(tmp_path, 10)
    assert first["pieces"][:5] == [" b", "a", "€", "\u2028", "</script>"] and first["cut"] == 7
    assert first["difference"][:5] == [0.0, -0.25, -1.0, 0.0, 0.0] and len(first["difference"]) == len(first["pieces"])
    assert second["difference"] is None and second["step"] == 7
    page = page_of(write_rows(tmp_path, [{"step": 7, "reward/mean": 1.0}]))
    assert page.data["samples"][0]["pieces"][:5] == first["pieces"][:5] and "samples" in page.ids("div")


def test_a_piece_is_decoded_once_a_run(tmp_path: Path) -> None:
    asked = Counter[tuple[int, ...]]()

    def decode(tokens: list[int]) -> str:
        asked[tuple(tokens)] += 1
        return "".join(map(str, tokens))

    for step in (1, 2):
        sampled = Sample("p", [3, 4, 3], "x", 1.0, "stop", 0, [-1.0] * 3, number=0)
        write_token_samples(tmp_path, step, [sampled], {}, decode)
    assert asked == Counter([(3,), (3, 3), (4,), (4, 4)])


def test_samples_of_a_page_are_spread_over_the_run(tmp_path: Path) -> None:
    for step in range(1, 101):
        write_token_samples(tmp_path, step, [sample(step, 0, random.Random(step), 0.5)] * 4, {}, str)
    steps = [row["step"] for row in read_token_samples(tmp_path, 48)]
    assert len(steps) == 48 and len(set(steps)) == 12 and steps[0] == 1 and steps[-1] == 100


def test_a_page_loads_itself_anew_only_while_its_run_goes_on(tmp_path: Path) -> None:
    done, going = write_run(tmp_path / "done", steps=8), write_run(tmp_path / "going", steps=8, of=80)
    assert page_of(done).data["refresh"] == 0 and page_of(going).data["refresh"] > 0
    assert "8 of 80" in page_of(going).words


def test_a_folder_without_rows_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", [{"step": 1}])
    write_rows(tmp_path / "b", [])
    with pytest.raises(UserError, match="b': metrics.jsonl has no whole line yet; wait for the first step"):
        report([str(tmp_path / "a"), str(tmp_path / "b")], out=str(tmp_path / "x.html"))
    assert not (tmp_path / "x.html").exists()


def test_fault_22_a_run_makes_its_page_beside_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps=20, of=40)
    page = LivePage(run, every_s=1e9)
    page.refresh()
    page.refresh()  # one is being made, or was made and another is not due
    page.wait()
    written = (run / "report.html").stat().st_mtime_ns
    assert "20 of 40" in Page((run / "report.html").read_text()).words
    page.refresh()
    page.wait()
    assert (run / "report.html").stat().st_mtime_ns == written
    page.close()
    assert (run / "report.html").stat().st_mtime_ns > written
    assert capsys.readouterr().out == f"verdict: healthy\nreport: {run}/report.html\n"


def test_a_run_that_failed_has_a_page_of_its_last_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page_of_a_run_that_ended(str(tmp_path / "none"))
    write_rows(tmp_path, [])
    page_of_a_run_that_ended(str(tmp_path))  # it failed before its first step
    assert not (tmp_path / "report.html").exists() and capsys.readouterr() == ("", "")
    write_rows(tmp_path, [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 0.5}])
    page_of_a_run_that_ended(str(tmp_path))
    assert f"report: {tmp_path}/report.html\n" in capsys.readouterr().out
    page_of_a_run_that_ended(str(tmp_path))  # the page is newer than the rows
    assert capsys.readouterr().out == ""


def test_a_page_that_cannot_be_made_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = LivePage(tmp_path / "gone", every_s=0)
    for _ in range(2):
        page.refresh()
        page.wait()
    page.close()
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1 and "gone/report.html could not be made: " in out.err
