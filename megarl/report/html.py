"""`megarl report RUN`: the run's curves as one self-contained page, and its learning curve in the terminal."""

from __future__ import annotations

import json
import os
import sys
from html import escape
from pathlib import Path
from typing import Any

from megarl.errors import UserError
from megarl.observe.metrics import METRICS_FILE, read_metrics
from megarl.observe.progress import count, duration
from megarl.observe.worst import read_worst
from megarl.report.curves import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Series,
    area_chart,
    colour_of,
    css,
    heat_map,
    line_chart,
    text_curve,
    thin,
)
from megarl.report.panels import GROUPS, Panel

Rows = list[dict[str, Any]]
WORST = 24  # tokens on a page


STYLE = """
*{box-sizing:border-box}body{margin:0 auto;max-width:1280px;padding:20px 16px 60px;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif}h1{font-size:22px;margin:0;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 0}
p{margin:2px 0 12px;color:var(--soft)}.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px;margin:16px 0}
.tile{border:1px solid var(--rule);border-radius:8px;padding:8px 12px}.tile b{display:block;font-size:21px;font-weight:600}
.tile span{color:var(--soft);font-size:13px}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px}
figure{margin:0;border:1px solid var(--rule);border-radius:8px;padding:10px 10px 4px;min-width:0}figcaption{font-weight:600;font-size:14px}
.keys{font-size:12.5px;color:var(--soft);min-height:19px;display:flex;flex-wrap:wrap;gap:0 12px}
.keys i{display:inline-block;width:10px;height:3px;border-radius:2px;margin-right:5px;vertical-align:middle}
svg{display:block;width:100%;height:auto}svg.key{display:inline-block;width:16px;height:4px;margin-right:5px;vertical-align:middle}
mark{background:var(--c1);color:var(--paper);border-radius:3px;padding:0 2px}td.text{text-align:left;font:12.5px ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere;min-width:260px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:3px 10px;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--soft);font-weight:500}pre{overflow-x:auto;font-size:12.5px;border:1px solid var(--rule);border-radius:8px;padding:12px}
summary{cursor:pointer;font-size:17px;font-weight:600;margin-top:34px}.cursor{stroke:var(--soft);stroke-width:1;visibility:hidden}
"""

# Under the pointer: the values of the nearest step, in place of the legend's plain names.
SCRIPT = """
for(const f of document.querySelectorAll('figure[data-at]')){const d=JSON.parse(f.dataset.at),svg=f.querySelector('svg:not(.key)'),
line=f.querySelector('.cursor'),out=[...f.querySelectorAll('.keys b')],L=LEFT,R=RIGHT,W=WIDTH,a=d.steps[0],z=Math.max(d.steps.at(-1),a+1);
const show=e=>{const b=svg.getBoundingClientRect(),x=(e.clientX-b.left)/b.width*W,s=a+(x-L)/(W-L-R)*(z-a);
let i=0;d.steps.forEach((v,j)=>{if(Math.abs(v-s)<Math.abs(d.steps[i]-s))i=j});
const p=L+(d.steps[i]-a)/(z-a)*(W-L-R);line.setAttribute('x1',p);line.setAttribute('x2',p);line.style.visibility='visible';
out.forEach((o,j)=>{const v=d.values[j][i];o.textContent=v==null?'':' '+Number(v.toPrecision(4))+' at '+d.steps[i]})};
svg.addEventListener('pointermove',show);
svg.addEventListener('pointerleave',()=>{line.style.visibility='hidden';out.forEach(o=>o.textContent='')})}
"""


def report(run_dirs: list[str], svg: str | None = None, out: str | None = None) -> int:
    """One page of curves: of one run, with its worst tokens, at run_dir/report.html; of several overlaid, at
    ./report.html; or at `out`.

    Also writes the learning curve of the first run to `svg` if given,
    and prints it. UserError where a folder holds no metrics.
    """
    runs = {name: _rows(name) for name in run_dirs}
    first, rows = next(iter(runs.items()))
    page = Path(out) if out else (Path(first) if len(runs) == 1 else Path()) / "report.html"
    _write(page, render(first, rows) if len(runs) == 1 else render_overlay(runs))
    mark = "•" if (sys.stdout.encoding or "").lower().startswith("utf") else "*"
    for name, each in runs.items():
        curve = text_curve([row["step"] for row in each], [row.get("reward/mean") for row in each], mark=mark)
        print(f"{name}: reward/mean over {len(each)} steps\n{curve}")
        last = last_eighth(each, "reward/mean")
        if last is not None:
            print(f"reward/mean over the last eighth of the steps: {last:.3f}")
    if svg is not None:
        _write(Path(svg), learning_curve_svg(rows))
        print(f"learning curve: {svg}")
    print(f"report: {page}")
    return 0


def _write(path: Path, text: str) -> None:
    """The file, whole or not at all; folders that are missing are made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}; give another file") from None


def _rows(run_dir: str) -> Rows:
    try:
        rows = read_metrics(run_dir)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"run folder {run_dir!r} has no {METRICS_FILE}; give the run.dir of a run that has done a step"
        ) from None
    if not rows:
        raise UserError(f"run folder {run_dir!r}: {METRICS_FILE} has no whole line yet; wait for the first step")
    return rows


def last_eighth(rows: Rows, key: str) -> float | None:
    """Mean of `key` over the last eighth of the steps, at least one; None where it is missing."""
    values = [row[key] for row in rows[-max(1, len(rows) // 8) :] if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def learning_curve_svg(rows: Rows) -> str:
    """The reward as a picture that stands alone, light or dark as the reader's page is."""
    inside = line_chart(
        [row["step"] for row in rows], [Series("reward", [row.get("reward/mean") for row in rows])], low=0.0, high=1.0
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 18}" width="{2 * WIDTH}" role="img">'
        f"<title>Mean reward by step</title><style>{css('svg')}</style>"
        f'<text class="tick" x="{LEFT}" y="13">mean reward by step</text><g transform="translate(0 16)">{inside}</g></svg>\n'
    )


def render(run_dir: str, rows: Rows) -> str:
    """The page. A panel none of whose metrics occurs is left out, and so is a group without panels."""
    rows = [_with_other_time(row) for row in rows]
    groups = []
    for group in GROUPS:
        panels = "".join(_panel(panel, rows) for panel in group.panels)
        if panels:
            groups.append(f'<h2>{group.title}</h2><p>{group.text}</p><div class="grid">{panels}</div>')
    config = Path(run_dir) / "config.yaml"
    worst = read_worst(Path(run_dir), rows[-max(1, len(rows) // 8)]["step"], WORST)
    config_text = (
        escape(config.read_text("utf-8", errors="replace")) if config.is_file() else "no config.yaml in this folder"
    )
    body = (
        f"<h1>{escape(str(run_dir))}</h1>{_tiles(rows)}{''.join(groups)}{_worst(worst)}"
        f"<h2>Summary</h2><p>Over all steps; end is the mean of the last eighth.</p>{_summary(rows)}"
        f"<details><summary>Configuration</summary><pre>{config_text}</pre></details>"
        f"{_script()}"
    )
    return html_page(Path(run_dir).name, body)


def render_overlay(runs: dict[str, Rows]) -> str:
    """Several runs in the same charts: a colour a run, a dash pattern a
    metric. Heat maps and stacked times are of one run only.
    """
    names = _short(list(runs))
    steps = sorted({row["step"] for rows in runs.values() for row in rows})
    by_step = {name: {row["step"]: row for row in rows} for name, rows in zip(names, runs.values())}
    groups = []
    for group in GROUPS:
        panels = ""
        for panel in group.panels:
            series = [
                Series(
                    f"{name}, {text}" if len(panel.keys) > 1 else name,
                    [_number(rows.get(s, {}).get(key)) for s in steps],
                    i,
                    dash,
                )
                for i, (name, rows) in enumerate(by_step.items())
                for dash, (key, text) in enumerate(panel.keys.items())
            ]
            series = [one for one in series if panel.kind == "line" and any(value is not None for value in one.values)]
            panels += _chart(panel, steps, series) if series else ""
        if panels:
            groups.append(f'<h2>{group.title}</h2><p>{group.text}</p><div class="grid">{panels}</div>')
    rewards = [
        (escape(name), _show(last_eighth(rows, "reward/mean"), "{:.3f}")) for name, rows in zip(names, runs.values())
    ]
    text = "Reward, mean of the last eighth of each run's steps."
    return html_page(
        " and ".join(names), f"<h1>{len(runs)} runs</h1><p>{text}</p>{tile_row(rewards)}{''.join(groups)}{_script()}"
    )


def _short(folders: list[str]) -> list[str]:
    """Names that tell the runs apart: the last part of each path, or all of it where the last parts are equal."""
    last = [Path(folder).name for folder in folders]
    return last if len(set(last)) == len(last) else folders


def _script() -> str:
    return f"<script>const LEFT={LEFT},RIGHT={RIGHT},WIDTH={WIDTH};{SCRIPT}</script>"


def html_page(title: str, body: str, style: str = "") -> str:
    """A page that needs no other file; `style` is added to the common one."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>megarl: {escape(title)}</title>'
        f"<style>{css(':root')}{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def _with_other_time(row: dict[str, Any]) -> dict[str, Any]:
    parts = [row.get(f"time/{name}_s") for name in ("rollout", "old_logprob", "update", "sync")]
    if row.get("time/step_s") is None or all(part is None for part in parts):
        return row
    return {**row, "time/other_s": max(0.0, row["time/step_s"] - sum(part or 0.0 for part in parts))}


def _series(panel: Panel, rows: Rows) -> list[Series]:
    series = [Series(name, [_number(row.get(key)) for row in rows]) for key, name in panel.keys.items()]
    return [one for one in series if any(value is not None for value in one.values)]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _panel(panel: Panel, rows: Rows) -> str:
    steps = [row["step"] for row in rows]
    if panel.kind == "heat":
        (key,) = panel.keys
        known = [row for row in rows if row.get(key) and None not in row[key]]
        return (
            figure(panel.title, "", "", heat_map([row["step"] for row in known], [row[key] for row in known]))
            if known
            else ""
        )
    return _chart(panel, steps, _series(panel, rows))


def _chart(panel: Panel, steps: list[int], series: list[Series]) -> str:
    bounds = {"log": panel.log, "low": panel.low, "high": panel.high}
    chart = area_chart(steps, series) if panel.kind == "area" else line_chart(steps, series, **bounds)
    if not chart:
        return ""
    keys = "".join(f"<span>{_sample(one, i)}{escape(one.name)}<b></b></span>" for i, one in enumerate(series))
    thin_steps, thin_series = thin(steps, series)
    data = {
        "steps": thin_steps,
        "values": [[v if v is None else float(f"{v:.5g}") for v in s.values] for s in thin_series],
    }
    return figure(panel.title, keys, json.dumps(data, separators=(",", ":")), chart)


def _sample(series: Series, place: int) -> str:
    style = f"line s{colour_of(series, place)} d{series.dash % 4}"
    return f'<svg class="key" viewBox="0 0 16 4"><line class="{style}" x1="0" x2="16" y1="2" y2="2"/></svg>'


def _worst(rows: list[dict[str, Any]]) -> str:
    """The section of the worst tokens of a run (megarl.observe.worst); empty where there are none."""
    if not rows:
        return ""
    cells = [[f"{row['rollout']:.4f}", f"{row['trainer']:.4f}", str(row["step"])] for row in rows]
    table = token_table(rows, ["log mu", "log pi_old", "step"], cells)
    return f"<h2>Worst tokens</h2><p>By |log pi_old - log mu|, over the last eighth of the steps.</p>{table}"


def token_table(rows: list[dict[str, Any]], names: list[str], cells: list[list[str]]) -> str:
    """Tokens in their text, each row with `before`, `token` and `after`, and beside it
    the cells of the named columns.
    """
    lines = []
    for row, values in zip(rows, cells, strict=True):
        before, token, after = (escape(row[part]).replace("\n", "↵") for part in ("before", "token", "after"))
        text = f"{before}<mark>{token or '&nbsp;'}</mark>{after}"
        lines.append(f'<tr><td class="text">{text}</td>{"".join(f"<td>{value}</td>" for value in values)}</tr>')
    head = "".join(f"<th>{name}</th>" for name in ["text", *names])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def figure(title: str, keys: str, data: str, chart: str) -> str:
    """One chart with its title and the legend `keys`; `data` is what the pointer shows, as JSON, or empty."""
    attribute = f' data-at="{escape(data)}"' if data else ""
    return (
        f'<figure{attribute}><figcaption>{escape(title)}</figcaption><div class="keys">{keys}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{chart}'
        f'<line class="cursor" y1="8" y2="{HEIGHT - 24}"/></svg></figure>'
    )


def _tiles(rows: Rows) -> str:
    end = {key: last_eighth(rows, key) for key in rows[-1] if key != "routing/layer_agreement"}
    seconds = sum(row.get("time/step_s") or 0.0 for row in rows)
    tiles = [
        ("steps", str(rows[-1]["step"])),
        ("reward, last eighth", _show(end.get("reward/mean"), "{:.3f}")),
        ("KL k3 to rollout", _show(end.get("mismatch/kl_k3"), "{:.1e}")),
        ("routing agreement", _show(end.get("routing/agree_rollout_old"), "{:.4f}")),
        ("tokens a second", count(end["throughput/tokens_per_s"]) if end.get("throughput/tokens_per_s") else ""),
        ("time", duration(seconds) if seconds else ""),
    ]
    return tile_row(tiles)


def tile_row(tiles: list[tuple[str, str]]) -> str:
    """(name, value) as tiles; one without a value is left out."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{v}</b><span>{name}</span></div>' for name, v in tiles if v)
        + "</div>"
    )


def _show(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _summary(rows: Rows) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "step"))
    lines = []
    for key in keys:
        values = [value for row in rows if (value := _number(row.get(key))) is not None]
        if values:
            cells = (values[0], last_eighth(rows, key), min(values), max(values))
            lines.append(
                f"<tr><td>{escape(key)}</td>" + "".join(f"<td>{_show(cell, '{:.5g}')}</td>" for cell in cells) + "</tr>"
            )
    head = "".join(f"<th>{name}</th>" for name in ("metric", "first", "end", "lowest", "highest"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
