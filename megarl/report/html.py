"""`megarl report RUN ...`: a verdict, and the curves of a run, or of several overlaid, as one self-contained page."""

from __future__ import annotations

import sys
import time
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from megarl.errors import UserError
from megarl.folders import standing, takes_files, write_whole
from megarl.observe.metrics import METRICS_FILE, read_metrics
from megarl.observe.progress import count, duration
from megarl.observe.token_samples import read_token_samples
from megarl.observe.worst import read_worst
from megarl.report.charts import Chart, Run, figure, run_charts
from megarl.report.curves import learning_curve_svg, text_curve
from megarl.report.page import capital, page, table_of, tiles, token_table, verdict_box
from megarl.report.verdict import Rows, Verdict, column, first_eighth, judge, last_eighth, number, precision_of, show

WORST = 24  # tokens on a page
SAMPLES = 48  # responses on a page
REFRESH_S = 60  # how often a page that is not touched loads itself anew while its run goes on


def report(run_dirs: list[str], svg: str | None = None, out: str | None = None) -> int:
    """One page: of one run at run_dir/report.html, of several at ./report.html, or at `out`; folders are made.

    Prints each run's verdict and learning curve, and writes that of the first run to `svg` if given. UserError where
    a folder holds no metrics.
    """
    runs = load_runs(run_dirs)
    if svg is not None:
        refuse_target(Path(svg))
    path = Path(out) if out else (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    write_page(path, runs)
    mark = "•" if (sys.stdout.encoding or "").lower().startswith("utf") else "*"
    for run in runs:
        curve = text_curve([row["step"] for row in run.rows], column(run.rows, "reward/mean"), mark=mark)
        if curve:
            print(f"{run.folder}: reward/mean over {len(run.rows)} steps\n{curve}")
        first, last = (end(run.rows, "reward/mean") for end in (first_eighth, last_eighth))
        if last is not None:
            before = "" if first is None else f" (over the first: {first:.3f})"
            print(f"reward/mean over the last eighth of the steps: {last:.3f}{before}")
        seconds = [value for value in column(run.rows, "time/step_s") if value is not None]
        if seconds:
            print(f"seconds a step, median: {median(seconds):.2f}")
        print("\n".join(judge(run.rows, run.precision).lines))
    if svg is not None:
        write(Path(svg), learning_curve_svg(runs[0].rows))
        print(f"learning curve: {svg}")
    print(f"report: {path}")
    return 0


def write_page(path: Path, runs: list[Run]) -> None:
    write(path, render(runs, path.parent))


def refuse_target(path: Path) -> None:
    """Raises UserError for a folder, for a file that is none of ours (no page or picture, with what is in it), and
    where none can be made.
    """
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give a file")
    if not takes_files(there := standing(path)):
        raise UserError(f"{str(path)!r} cannot be written: {str(there)!r} takes no files; give another file")
    if path.is_file():
        try:
            with path.open("rb") as file:
                first = file.read(64).lower()
        except OSError as error:
            raise UserError(f"{str(path)!r} is there and cannot be read: {error.strerror}; give another file") from None
        if first and not first.startswith((b"<!doctype html", b"<svg", b"<?xml")):
            raise UserError(f"{str(path)!r} is there and is no page or picture; give another file, or remove it")


def write(path: Path, text: str) -> None:
    """The file, whole or not at all; folders that are missing are made."""
    refuse_target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}; give another file") from None


def load_runs(run_dirs: list[str]) -> list[Run]:
    """Every folder once, under the shortest names that tell them apart. UserError where one has no row."""
    folders = list(dict.fromkeys(run_dirs))
    last = [Path(folder).resolve().name for folder in folders]
    names = last if len(set(last)) == len(last) else folders
    return [_load(folder, name) for folder, name in zip(folders, names, strict=True)]


def _load(run_dir: str, name: str) -> Run:
    try:
        rows = read_metrics(run_dir)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"run folder {run_dir!r} has no {METRICS_FILE}; give the run.dir of a run that has done a step"
        ) from None
    if not rows:
        raise UserError(f"run folder {run_dir!r}: {METRICS_FILE} has no whole line yet; wait for the first step")
    file = Path(run_dir) / "config.yaml"
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        tree = None
    config = tree if isinstance(tree, dict) else {}
    return Run(Path(run_dir), name, [_with_other_time(row) for row in rows], config, text, precision_of(config, rows))


def _with_other_time(row: dict[str, Any]) -> dict[str, Any]:
    parts = [
        number(row.get(f"time/{n}_s")) for n in ("rollout", "old_logprob", "reference", "values", "update", "sync")
    ]
    whole = number(row.get("time/step_s"))
    if whole is None or all(part is None for part in parts):
        return row
    return {**row, "time/other_s": max(0.0, whole - sum(part or 0.0 for part in parts))}


def render(runs: list[Run], where: Path) -> str:
    """The page. A chart none of whose metrics occurs is left out. where: the folder it will lie in."""
    steps, groups = run_charts(runs)
    charts: list[Chart] = []
    sections = []
    for group, members in groups:
        sections.append(f"<h2>{escape(group.title)}</h2><p>{escape(group.text)}</p>{_figures(members, len(charts))}")
        charts += members
    names = {key: chart.name for chart in charts for key in chart.keys}
    data: dict[str, Any] = {"steps": steps, "charts": [chart.data() for chart in charts], "samples": []}
    if len(runs) == 1:
        head, tail, data["samples"] = _of_one(runs[0], where, names)
        data |= {"refresh": REFRESH_S if _goes_on(runs[0]) else 0, "written": int(time.time())}
    else:
        head, tail = _of_several(runs, where, names)
        data["runs"] = [run.name for run in runs]
    title = " and ".join(run.name for run in runs)
    return page(title, head + "".join(sections) + tail, data)


def _figures(charts: list[Chart], first: int) -> str:
    """Charts in a grid; those that are zero throughout are folded away below it."""
    frames = [figure(chart, first + i) for i, chart in enumerate(charts)]
    shown = "".join(frame for frame, chart in zip(frames, charts, strict=True) if not chart.zero)
    folded = "".join(frame for frame, chart in zip(frames, charts, strict=True) if chart.zero)
    names = ", ".join(chart.title for chart in charts if chart.zero)
    text = f'<div class="grid">{shown}</div>' if shown else ""
    if folded:
        head = f"<summary>0 at every step: {escape(names)}</summary>"
        text += f'<details class="zero">{head}<div class="grid">{folded}</div></details>'
    return text


def _of_one(run: Run, where: Path, names: dict[str, str]) -> tuple[str, str, list[dict[str, Any]]]:
    """(what stands above the curves of a run, what below, its samples)."""
    verdict = judge(run.rows, run.precision)
    samples = read_token_samples(run.folder, SAMPLES)
    head = (
        f'<h1>{escape(run.name)}</h1><p class="path">{escape(str(run.folder))}, {_stamp(run)}</p>'
        f"{verdict_box(capital(_heading(verdict)), verdict.findings, where, names)}{tiles(_tiles(run))}"
    )
    tail = (
        f"{_sample_section(samples)}{_worst(run)}"
        f"<h2>Summary</h2><p>Over all steps; end is the mean of the last eighth. docs/metrics.md says what each is.</p>"
        f"{_summary(run.rows)}{_configuration(run)}"
    )
    return head, tail, samples


def _of_several(runs: list[Run], where: Path, names: dict[str, str]) -> tuple[str, str]:
    head = [f"<h1>{len(runs)} runs</h1>"]
    for place, run in enumerate(runs):
        verdict = judge(run.rows, run.precision)
        reward = last_eighth(run.rows, "reward/mean")
        at_end = "" if reward is None else f", reward {show(reward)} at the end"
        text = f"{run.name}{at_end}: {_heading(verdict)}"
        box = verdict_box(text, verdict.findings, where, names, folded=True)
        head.append(f'<div class="of f{place % 6}">{box}</div>')
    head.append(f'<div class="runs" id="runs"></div>{_differences(runs)}')
    return "".join(head), "".join(_configuration(run) for run in runs)


def _heading(verdict: Verdict) -> str:
    """The box lists the findings themselves."""
    many = len(verdict.findings)
    if many:
        return "1 curve is out of line" if many == 1 else f"{many} curves are out of line, in the order to look at"
    return verdict.text


def _differences(runs: list[Run]) -> str:
    """The configuration keys in which the runs differ."""
    flat = [_flat(run.config) for run in runs]
    keys = [
        key for key in dict.fromkeys(key for tree in flat for key in tree) if key not in ("run.dir", "launch.store")
    ]
    rows = [
        [key, *(str(tree.get(key, "-")) for tree in flat)]
        for key in keys
        if len({str(tree.get(key, "-")) for tree in flat}) > 1
    ]
    missing = [run.name for run in runs if not run.config]
    note = f"<p>No config.yaml of {escape(', '.join(missing))}.</p>" if missing else ""
    body = table_of(["key", *(run.name for run in runs)], rows, "differences") if rows else "<p>None.</p>"
    return f"<h2>Differences of configuration</h2>{note}{body}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _configuration(run: Run) -> str:
    text = escape(run.config_text) or "no config.yaml in this folder"
    return f"<details><summary>Configuration of {escape(run.name)}</summary><pre>{text}</pre></details>"


def _planned(run: Run) -> int | None:
    """train.steps of the run's configuration."""
    train = run.config.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) else None


def _goes_on(run: Run) -> bool:
    planned = _planned(run)
    return planned is not None and run.rows[-1]["step"] < planned


def _stamp(run: Run) -> str:
    planned = _planned(run)
    of = f" of {planned}" if planned else ""
    return f"step {run.rows[-1]['step']}{of}, written {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _sample_section(samples: list[dict[str, Any]]) -> str:
    """Its list is made by page.js."""
    if not samples:
        return ""
    return (
        "<h2>Samples</h2><p>Responses of the run, to read and to search. The shade of a token is "
        "|log pi_old - log mu|, full at a factor of 2; the pointer on it shows the numbers.</p>"
        '<div id="samples"></div>'
    )


def _worst(run: Run) -> str:
    """The section of the worst tokens of a run (megarl.observe.worst); empty where there are none."""
    rows = read_worst(run.folder, run.rows[-max(1, len(run.rows) // 8)]["step"], WORST)
    if not rows:
        return ""
    cells = [[f"{row['rollout']:.4f}", f"{row['trainer']:.4f}", str(row["step"])] for row in rows]
    tokens = token_table(rows, ["log mu", "log pi_old", "step"], cells)
    return f"<h2>Worst tokens</h2><p>By |log pi_old - log mu|, over the last eighth of the steps.</p>{tokens}"


def _tiles(run: Run) -> list[tuple[str, str]]:
    rows, planned = run.rows, _planned(run)

    def end(key: str, form: str) -> str:
        value = last_eighth(rows, key)
        return "" if value is None else form.format(value)

    seconds = sum(value for value in column(rows, "time/step_s") if value is not None)
    speed = last_eighth(rows, "throughput/tokens_per_s")
    return [
        ("steps", f"{rows[-1]['step']}{f' of {planned}' if planned else ''}"),
        ("reward, last eighth", end("reward/mean", "{:.3f}")),
        ("KL k3 to the rollout", end("mismatch/kl_k3", "{:.1e}")),
        ("routing agreement", end("routing/agree_rollout_old", "{:.4f}")),
        ("tokens a second", count(speed) if speed else ""),
        ("time", duration(seconds) if seconds else ""),
    ]


def _summary(rows: Rows) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "step"))
    lines = []
    for key in keys:
        values = [value for value in column(rows, key) if value is not None]
        if values:
            cells = (values[0], last_eighth(rows, key), min(values), max(values))
            lines.append([key, *("" if cell is None else f"{cell:.5g}" for cell in cells)])
    return table_of(["metric", "first", "end", "lowest", "highest"], lines)
