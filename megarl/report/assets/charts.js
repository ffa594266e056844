"use strict";
// Curves of a report, drawn by uPlot. A logarithmic axis is a linear one of log10, so that range and ticks are ours.

const HEIGHT = 190;
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = line => css(`--c${line.colour % 6}`);

// 0.8312, 1.21e-13, 4e-4: at most four digits.
function show(value) {
  if (value == null || Number.isNaN(value)) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

// The y range that shows these values, numbers of the axis: {min, max, beyond}. A few spikes beyond the rest do not stretch it; beyond counts
// them. low, high: shown at least. limits: shown where that does not squeeze the curve to less than a third.
function axisRange(values, {log = false, low = null, high = null, limits = []} = {}) {
  const sorted = values.filter(v => v != null).sort((a, b) => a - b);
  if (!sorted.length) return {min: 0, max: 1, beyond: 0};
  let min = sorted[0], max = sorted.at(-1);
  const few = Math.max(1, Math.floor(sorted.length / 100));  // on either side
  const lower = sorted[few], upper = sorted[sorted.length - 1 - few], spread = upper - lower;
  if (!log && sorted.length >= 20 && spread > 0) {
    if (max > upper + 3 * spread) max = upper + 0.6 * spread;
    if (min < lower - 3 * spread) min = lower - 0.6 * spread;
  }
  const beyond = sorted.filter(v => v < min || v > max).length;
  if (low != null) min = Math.min(min, low);
  if (high != null) max = Math.max(max, high);
  const least = log ? 0.6 : Math.max(Math.abs(max) * 1e-4, 1e-12);
  for (const limit of limits) {
    const wide = Math.max(max, limit) - Math.min(min, limit);
    if (wide <= (log ? Math.max(3 * (max - min), 2.5) : 3 * Math.max(max - min, least))) {
      min = Math.min(min, limit);
      max = Math.max(max, limit);
    }
  }
  if (max - min < least) {
    const pad = log ? (least - (max - min)) / 2 : Math.max(Math.abs(max) * 0.05, least);
    max += max === 0 && !log ? 1 : pad;
    min -= min === 0 && !log ? 0 : pad;
  }
  const air = (max - min) * 0.04;
  return {min: min === low ? min : min - air, max: max === high ? max : max + air, beyond};
}

// Median of the `window` values around each that are there: a spike stays in the faint line behind.
function smooth(values, window) {
  const half = Math.floor(window / 2);
  return values.map((value, i) => {
    if (value == null) return null;
    const near = values.slice(Math.max(0, i - half), i + half + 1).filter(v => v != null).sort((a, b) => a - b);
    return (near[(near.length - 1) >> 1] + near[near.length >> 1]) / 2;
  });
}

// Ticks of a logarithmic axis: powers of ten, and 2 and 5 between them where the axis is short.
function logTicks(min, max) {
  const every = Math.max(1, Math.ceil((max - min) / 5)), ticks = [];
  for (let p = Math.floor(min / every) * every; p <= max; p += every)
    for (const digit of max - min < 1.5 ? [1, 2, 5] : [1]) ticks.push(p + Math.log10(digit));
  return ticks.filter(t => t >= min && t <= max);
}

// Between two colours written #rrggbb or #rgb.
function mixed(a, b) {
  const parts = c => (c.length === 4 ? [...c.slice(1)].map(d => d + d) : c.slice(1).match(/../g)).map(h => parseInt(h, 16));
  const [from, to] = [parts(a), parts(b)];
  return `rgb(${from.map((v, i) => Math.round(0.65 * v + 0.35 * to[i])).join(",")})`;
}

function stacked(lines) {
  const total = lines[0].values.map(() => 0);
  return lines.map(line => line.values.map((v, i) => (total[i] += v ?? 0)));
}

class Chart {
  constructor(figure, data, steps, shared) {
    Object.assign(this, {figure, data, shared, x: data.x ?? steps, beyond: []});
    const least = data.kind === "stairs" ? Math.log10(0.5) : null;  // a bin without tokens stands below one with one
    this.scale = data.log ? v => (v > 0 ? Math.log10(v) : least) : v => v;
    this.where = figure.querySelector(".where");
    this.series = [];  // of uPlot, from its second on: {line, faint}
    this.columns = this.makeColumns();
    this.legend();
    this.draw();
  }

  makeColumns() {
    const {kind, lines, log} = this.data;
    if (kind === "heat") return [this.x.map(() => null)];
    if (kind === "area") {
      this.series = lines.map(line => ({line, faint: false})).reverse();
      return stacked(lines).reverse();
    }
    const window = Math.floor(this.x.length / 40), columns = [];
    for (const line of lines) {
      const values = line.values.map(v => (v == null ? null : this.scale(v)));
      const many = kind === "line" && window > 1 && values.filter(v => v != null).length > 80;
      if (many) { this.series.push({line, faint: true}); columns.push(values); }
      this.series.push({line, faint: false});
      columns.push(many ? smooth(values, window) : values);
    }
    return columns;
  }

  draw() {
    const {kind} = this.data, plot = this.figure.querySelector(".plot");
    if (this.plot) this.plot.destroy();
    const font = "11px system-ui, sans-serif", soft = () => css("--soft"), grid = {stroke: () => css("--rule"), width: 1};
    const axis = {stroke: soft, font, grid, ticks: {show: false}};
    const options = {
      width: plot.clientWidth || 320, height: HEIGHT, legend: {show: false}, padding: [8, 10, 0, 0],
      scales: {x: {time: false, range: (u, a, b) => (a === b ? [a - 1, b + 1] : [a, b])}, y: {range: u => this.range(u)}},
      axes: [{...axis, size: 26, grid: {show: false}, incrs: kind === "stairs" ? undefined : [1, 2, 5].flatMap(m => [...Array(9).keys()].map(p => m * 10 ** p)).sort((a, b) => a - b), space: 44,
              values: (u, ticks) => ticks.map(show)},
             {...axis, size: 48, space: 34, ...(this.data.log ? {splits: (u, i, min, max) => logTicks(kind === "stairs" ? 0 : min, max)} : {}),
              values: (u, ticks) => ticks.map(t => show(this.data.log ? 10 ** t : t))}],
      cursor: {y: false, drag: {x: true, y: false}, points: {size: 6, show: kind !== "heat"},
               ...(this.shared ? {sync: {key: "steps", scales: ["x", null], setSeries: false}} : {})},
      series: [{}, ...(kind === "heat" ? [{show: true, stroke: "transparent"}] : this.series.map(s => this.style(s)))],
      hooks: {drawClear: [u => this.limits(u)], drawAxes: kind === "heat" ? [u => this.heat(u)] : [], draw: [u => this.spikes(u)],
              setCursor: [u => this.point(u.cursor.idx)]},
    };
    this.plot = new uPlot(options, [this.x, ...this.columns], plot);
  }

  style({line, faint}) {
    const {kind} = this.data, few = line.values.filter(v => v != null).length <= 40;
    const stroke = () => colour(line) + (faint ? "50" : "");
    return {
      stroke, width: faint ? 1 : 1.6, dash: faint ? [] : DASHES[line.dash % 4], spanGaps: kind !== "area",
      fill: kind === "area" ? () => mixed(colour(line), css("--paper")) : undefined,
      paths: kind === "stairs" ? uPlot.paths.stepped({align: 0}) : undefined,
      points: {show: few && !faint && kind === "line", size: 4, fill: stroke},
      show: line.shown !== false,
    };
  }

  range(u) {
    const {kind, rows, low, high, log, limits} = this.data;
    if (kind === "heat") return [0, rows[0].length];
    const [from, to] = u.series[0].idxs ?? [0, this.x.length - 1], values = [];
    this.columns.forEach((column, i) => {
      if (this.series[i].line.shown !== false) for (let j = from; j <= to; j++) if (column[j] != null) values.push(column[j]);
    });
    const found = axisRange(values, {
      log, low: kind === "area" ? 0 : low, high, limits: limits.map(([level]) => this.scale(level)).filter(v => v != null),
    });
    const note = this.figure.querySelector(".beyond"), top = values.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
    note.textContent = found.beyond ? `${found.beyond} beyond the axis, to ${show(log ? 10 ** top : top)}` : "";
    return [found.min, found.max];
  }

  // Shades what is out of line.
  limits(u) {
    const {ctx, bbox} = u, tint = css("--tint");
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const [level, side] of this.data.limits) {
      const y = u.valToPos(this.scale(level), "y", true), end = side === "above" ? bbox.top : bbox.top + bbox.height;
      ctx.fillStyle = `rgba(${tint}, .09)`;
      if (side === "above" ? y > end : y < end) ctx.fillRect(bbox.left, Math.min(y, end), bbox.width, Math.abs(end - y));
      ctx.strokeStyle = `rgba(${tint}, .55)`;
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
    }
    ctx.restore();
  }

  // A triangle on the edge for every point beyond the axis.
  spikes(u) {
    const {min, max} = u.scales.y, size = 4 * devicePixelRatio, {ctx, bbox} = u;
    if (this.data.kind === "heat") return;
    this.columns.forEach((column, i) => {
      if (this.series[i].line.shown === false) return;
      ctx.fillStyle = colour(this.series[i].line);
      column.forEach((v, j) => {
        if (v == null || (v >= min && v <= max) || this.x[j] < u.scales.x.min || this.x[j] > u.scales.x.max) return;
        const x = u.valToPos(this.x[j], "x", true), up = v > max, edge = up ? bbox.top : bbox.top + bbox.height, way = up ? 1 : -1;
        ctx.beginPath();
        ctx.moveTo(x, edge);
        ctx.lineTo(x - size, edge + way * 1.6 * size);
        ctx.lineTo(x + size, edge + way * 1.6 * size);
        ctx.fill();
      });
    });
  }

  // Cells, the darker the further below 1; the scale ends at the lowest.
  heat(u) {
    const {rows} = this.data, lowest = Math.min(...rows.map(row => Math.min(...row))), {ctx, bbox} = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.fillStyle = css("--c1");
    rows.forEach((row, i) => {
      const left = i ? (this.x[i - 1] + this.x[i]) / 2 : this.x[0], right = i + 1 < rows.length ? (this.x[i] + this.x[i + 1]) / 2 : this.x[i];
      const a = Math.round(u.valToPos(left, "x", true)), b = Math.round(u.valToPos(right, "x", true));
      row.forEach((value, j) => {
        if (value >= 1) return;
        ctx.globalAlpha = (1 - value) / (1 - lowest);
        const top = Math.round(u.valToPos(j + 1, "y", true)), bottom = Math.round(u.valToPos(j, "y", true));
        ctx.fillRect(a, top, Math.max(1, b - a), bottom - top);
      });
    });
    ctx.restore();
  }

  legend() {
    const box = this.figure.querySelector(".keys"), {kind, lines, rows} = this.data;
    box.replaceChildren();
    this.values = [];
    if (kind === "heat") {
      const all = rows.flat(), text = document.createElement("button");
      text.innerHTML = "<span>lowest</span><b></b>";
      box.append(text);
      this.values.push(text.querySelector("b"));
      this.lowest = Math.min(...all);
      this.point(null);
      return;
    }
    for (const line of lines) {
      const button = keyButton(line, line.name);
      button.append(document.createElement("b"));
      button.onclick = () => this.toggle(line, line.shown === false);
      line.button = button;
      this.values.push(button.querySelector("b"));
      box.append(button);
    }
    this.point(null);
  }

  toggle(line, shown) {
    line.shown = shown;
    line.button.setAttribute("aria-pressed", String(shown));
    this.series.forEach((s, i) => { if (s.line === line) this.plot.setSeries(i + 1, {show: shown}); });
    this.plot.redraw(false, true);
  }

  // The legend shows the values at point i, or the last ones.
  point(i) {
    const {kind, lines, rows, xName} = this.data;
    this.where.textContent = i == null ? "" : `${xName} ${show(this.x[i])}`;
    if (kind === "heat") {
      const row = i == null ? null : rows[i], low = row ? Math.min(...row) : this.lowest;
      this.values[0].textContent = show(low) + (row ? `, layer ${row.indexOf(low)}` : "");
      return;
    }
    lines.forEach((line, n) => {
      const value = i == null ? line.values.findLast(v => v != null) : line.values[i];
      this.values[n].textContent = kind === "stairs" && i == null ? "" : show(value);
    });
  }

  resize() {
    const width = this.figure.querySelector(".plot").clientWidth;
    if (width && width !== this.plot.width) this.plot.setSize({width, height: HEIGHT});
  }
}

function keyButton(line, name) {
  const button = document.createElement("button"), text = document.createElement("span");
  button.type = "button";
  button.setAttribute("aria-pressed", "true");
  button.innerHTML = `<svg viewBox="0 0 16 6"><line x1="0" x2="16" y1="3" y2="3" stroke="var(--c${line.colour % 6})" stroke-width="2.4" stroke-dasharray="${DASHES[line.dash % 4].join(" ")}"/></svg>`;
  text.textContent = name;
  button.append(text);
  return button;
}
