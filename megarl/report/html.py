"""`megarl report RUN`: the run's curves as one self-contained page, and its learning curve in the terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

from megarl.errors import UserError
from megarl.report.curves import HEIGHT, LEFT, RIGHT, WIDTH, Series, area_chart, bar_chart, css, line_chart, text_curve, thin
from megarl.report.metrics import METRICS_FILE, read_metrics
from megarl.report.progress import count, duration

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One chart: metric key -> the name it is shown under."""

    title: str
    keys: dict[str, str]
    kind: Literal["line", "area", "bars"] = "line"
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Group:
    title: str
    text: str
    panels: list[Panel] = field(default_factory=list)


GROUPS = [
    Group(
        "Learning",
        "What the policy earns, and how it changes while it does.",
        [
            Panel("Reward", {"reward/mean": "mean", "reward/pass_at_g": "pass@G"}, low=0.0, high=1.0),
            Panel("Reward spread", {"reward/std": "standard deviation"}, low=0.0),
            Panel("Evaluation", {"eval/mean_at_k": "mean@k", "eval/pass_at_k": "pass@k"}, low=0.0, high=1.0),
            Panel("Response length, tokens", {"response/length_mean": "mean"}, low=0.0),
            Panel("Truncated responses", {"response/truncated_frac": "share"}, low=0.0),
            Panel("Entropy, nats", {"policy/entropy": "mean over response tokens"}, low=0.0),
            Panel("Loss", {"loss/value": "value"}),
            Panel("Gradient norm", {"optim/grad_norm": "before clipping"}, low=0.0),
            Panel("Learning rate", {"optim/lr": "lr"}, low=0.0),
        ],
    ),
    Group(
        "Mismatch: training engine against rollout engine",
        "The same weights, two engines: pi_old against mu. Zero is perfect.",
        [
            Panel("KL(mu, pi_old)", {"mismatch/kl_k3": "k3"}, log=True),
            Panel("KL(mu, pi_old), signed", {"mismatch/kl_k1": "k1"}),
            Panel("Largest |log pi_old - log mu|", {"mismatch/abs_logprob_diff_max": "maximum"}, log=True),
            Panel("Canary after a weight sync, largest |difference|", {"sync/canary_max_diff": "maximum"}, log=True),
            Panel("Tokens off by more than a factor of 2", {"mismatch/extreme_frac_2": "share"}, low=0.0),
            Panel("Importance weight", {"mismatch/is_weight_mean": "min(pi_old/mu, cap)", "loss/weight_mean": "as applied"}),
            Panel("Truncated weights", {"mismatch/is_truncated_frac": "of pi_old/mu", "loss/weight_truncated_frac": "as applied"}, low=0.0),
        ],
    ),
    Group(
        "Staleness and clipping",
        "The policy of each mini-batch against the one that rolled out: pi_theta against pi_old.",
        [
            Panel("KL(pi_old, pi_theta)", {"staleness/kl_k3": "k3"}, log=True),
            Panel("Largest ratio pi_theta / pi_old", {"staleness/ratio_max": "maximum"}, low=1.0),
            Panel("Clipped tokens", {"staleness/clip_frac_pos": "A > 0", "staleness/clip_frac_neg": "A < 0"}, low=0.0),
            Panel("Lag, optimizer steps", {"version/rollout_lag_max": "largest"}, low=0.0),
        ],
    ),
    Group(
        "Routing",
        "How far the engines, and the policy over its own updates, choose the same experts.",
        [
            Panel("Agreement", {"routing/agree_rollout_old": "rollout, pi_old", "routing/agree_old_current": "pi_old, pi_theta"}, high=1.0),
            Panel("Tokens with a layer that differs", {"routing/any_layer_differs_frac": "share"}, low=0.0),
            Panel("Largest score gap of a difference", {"routing/worst_gap": "maximum"}, low=0.0),
            Panel("Agreement by MoE layer, last step", {"routing/layer_agreement": ""}, kind="bars"),
            Panel(
                "Bytes of routes", {"routing/bytes_received_per_rank": "received, a rank", "routing/bytes_ingested": "ingested"}, low=0.0
            ),
            Panel("Rows without routes", {"routing/missing_rows": "rows"}, low=0.0),
        ],
    ),
    Group(
        "Time",
        "Where a step goes.",
        [
            Panel(
                "Seconds a step",
                {
                    "time/rollout_s": "rollout",
                    "time/old_logprob_s": "old log-probabilities",
                    "time/update_s": "update",
                    "time/sync_s": "weight sync",
                    "time/other_s": "other",
                },
                kind="area",
            ),
            Panel("Tokens a second", {"throughput/tokens_per_s": "whole step", "throughput/train_tokens_per_s": "training"}, low=0.0),
        ],
    ),
]

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
svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:3px 10px;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--soft);font-weight:500}pre{overflow-x:auto;font-size:12.5px;border:1px solid var(--rule);border-radius:8px;padding:12px}
summary{cursor:pointer;font-size:17px;font-weight:600;margin-top:34px}.cursor{stroke:var(--soft);stroke-width:1;visibility:hidden}
"""

# Under the pointer: the values of the nearest step, in place of the legend's plain names.
SCRIPT = """
for(const f of document.querySelectorAll('figure[data-at]')){const d=JSON.parse(f.dataset.at),svg=f.querySelector('svg'),
line=f.querySelector('.cursor'),out=[...f.querySelectorAll('.keys b')],L=LEFT,R=RIGHT,W=WIDTH,a=d.steps[0],z=Math.max(d.steps.at(-1),a+1);
const show=e=>{const b=svg.getBoundingClientRect(),x=(e.clientX-b.left)/b.width*W,s=a+(x-L)/(W-L-R)*(z-a);
let i=0;d.steps.forEach((v,j)=>{if(Math.abs(v-s)<Math.abs(d.steps[i]-s))i=j});
const p=L+(d.steps[i]-a)/(z-a)*(W-L-R);line.setAttribute('x1',p);line.setAttribute('x2',p);line.style.visibility='visible';
out.forEach((o,j)=>{const v=d.values[j][i];o.textContent=v==null?'':' '+Number(v.toPrecision(4))+' at '+d.steps[i]})};
svg.addEventListener('pointermove',show);
svg.addEventListener('pointerleave',()=>{line.style.visibility='hidden';out.forEach(o=>o.textContent='')})}
"""


def report(run_dir: str, svg: str | None = None) -> int:
    """Writes run_dir/report.html, and the learning curve to `svg` if given; prints the curve. UserError where there are no metrics."""
    rows = _rows(run_dir)
    page = Path(run_dir) / "report.html"
    page.write_text(render(run_dir, rows))
    steps, rewards = [row["step"] for row in rows], [row.get("reward/mean") for row in rows]
    mark = "•" if (sys.stdout.encoding or "").lower().startswith("utf") else "*"
    print(f"{run_dir}: reward/mean over {len(rows)} steps\n{text_curve(steps, rewards, mark=mark)}")
    last = last_eighth(rows, "reward/mean")
    if last is not None:
        print(f"reward/mean over the last eighth of the steps: {last:.3f}")
    if svg is not None:
        Path(svg).write_text(learning_curve_svg(rows))
        print(f"learning curve: {svg}")
    print(f"report: {page}")
    return 0


def _rows(run_dir: str) -> Rows:
    try:
        rows = read_metrics(run_dir)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"run folder {run_dir!r} has no {METRICS_FILE}; give the run.dir of a run that has done a step") from None
    if not rows:
        raise UserError(f"run folder {run_dir!r}: {METRICS_FILE} has no whole line yet; wait for the first step")
    return rows


def last_eighth(rows: Rows, key: str) -> float | None:
    """Mean of `key` over the last eighth of the steps, at least one; None where it is missing."""
    values = [row[key] for row in rows[-max(1, len(rows) // 8) :] if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def learning_curve_svg(rows: Rows) -> str:
    """The reward as a picture that stands alone, light or dark as the reader's page is."""
    inside = line_chart([row["step"] for row in rows], [Series("reward", [row.get("reward/mean") for row in rows])], low=0.0, high=1.0)
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
    config_text = escape(config.read_text()) if config.is_file() else "no config.yaml in this folder"
    body = (
        f"<h1>{escape(str(run_dir))}</h1>{_tiles(rows)}{''.join(groups)}"
        f"<h2>Summary</h2><p>Over all steps; end is the mean of the last eighth.</p>{_summary(rows)}"
        f"<details><summary>Configuration</summary><pre>{config_text}</pre></details>"
        f"<script>const LEFT={LEFT},RIGHT={RIGHT},WIDTH={WIDTH};{SCRIPT}</script>"
    )
    return html_page(Path(run_dir).name, body)


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
    if panel.kind == "bars":
        layers = next((row[key] for row in reversed(rows) for key in panel.keys if row.get(key)), None)
        if not layers:
            return ""
        values = [value or 0.0 for value in layers]
        return figure(panel.title, "", "", bar_chart([str(i) for i in range(len(values))], values, low=min(0.9, *values)))
    series = _series(panel, rows)
    bounds = {"log": panel.log, "low": panel.low, "high": panel.high}
    chart = area_chart(steps, series) if panel.kind == "area" else line_chart(steps, series, **bounds)
    if not chart:
        return ""
    keys = "".join(f'<span><i style="background:var(--c{i % 6})"></i>{escape(s.name)}<b></b></span>' for i, s in enumerate(series))
    thin_steps, thin_series = thin(steps, series)
    data = {"steps": thin_steps, "values": [[v if v is None else float(f"{v:.5g}") for v in s.values] for s in thin_series]}
    return figure(panel.title, keys, json.dumps(data, separators=(",", ":")), chart)


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
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{v}</b><span>{name}</span></div>' for name, v in tiles if v) + "</div>"


def _show(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _summary(rows: Rows) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "step"))
    lines = []
    for key in keys:
        values = [value for row in rows if (value := _number(row.get(key))) is not None]
        if values:
            cells = (values[0], last_eighth(rows, key), min(values), max(values))
            lines.append(f"<tr><td>{escape(key)}</td>" + "".join(f"<td>{_show(cell, '{:.5g}')}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("metric", "first", "end", "lowest", "highest"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
