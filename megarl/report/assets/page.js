"use strict";
// A report's page: its charts, the runs to show or hide, and the samples.

const DATA = JSON.parse(document.getElementById("data").textContent);
const charts = [];

function build(figure) {
  if (figure.chart) return figure.chart.resize();
  const data = DATA.charts[Number(figure.dataset.chart)];
  figure.chart = new Chart(figure, data, DATA.steps, data.x == null || data.kind === "heat");
  charts.push(figure.chart);
}

// What a closed <details> holds has no width: it is drawn when it is opened.
for (const figure of document.querySelectorAll("figure[data-chart]")) if (!figure.closest("details:not([open])")) build(figure);
for (const details of document.querySelectorAll("details.zero"))
  details.addEventListener("toggle", () => details.open && details.querySelectorAll("figure[data-chart]").forEach(build));
addEventListener("resize", () => charts.forEach(chart => chart.resize()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(chart => chart.draw()));

// A link to a chart that is folded away opens its fold.
function unfold() {
  const fold = document.getElementById(location.hash.slice(1))?.closest("details");
  if (fold) fold.open = true;
}
addEventListener("hashchange", unfold);
unfold();

const runs = document.getElementById("runs");
(DATA.runs ?? []).forEach((name, run) => {
  const button = keyButton({colour: run, dash: 0}, name);
  button.onclick = () => {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(shown));
    for (const chart of DATA.charts) for (const line of chart.lines) if (line.run === run) line.shown = shown;
    for (const chart of charts) for (const line of chart.data.lines) if (line.run === run) chart.toggle(line, shown);
  };
  runs.append(button);
});

function element(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text != null) made.textContent = text;
  return made;
}

// One response: shaded by the mismatch of each token, full at a factor of 2.
function sampleBox(sample) {
  const box = element("article", "sample"), head = element("header"), prompt = element("details"), tokens = element("div", "tokens");
  head.append(element("b", "", `reward ${show(sample.reward)}`), element("span", "", `step ${sample.step}`));
  head.append(element("span", "", `answer ${sample.answer}`), element("span", "", `${sample.tokens} tokens, ended by ${sample.finish_reason}`));
  if (sample.worst != null) head.append(element("span", "", `largest difference ${show(sample.worst)}`));
  prompt.append(element("summary", "", "prompt: " + sample.prompt.slice(-60)), element("pre", "", sample.prompt));
  sample.pieces.forEach((piece, i) => {
    const token = element("span", "", piece), difference = sample.difference?.[i];
    token.title = `log mu ${show(sample.rollout[i])}` + (difference == null ? "" : `, log pi_old - log mu ${show(difference)}`);
    if (difference) token.style.background = `rgba(${css("--tint")}, ${(0.6 * Math.min(1, Math.abs(difference) / Math.LN2)).toFixed(3)})`;
    tokens.append(token);
  });
  if (!sample.pieces.length) tokens.append(element("i", "", "empty"));
  if (sample.cut) tokens.append(element("i", "", ` (${sample.cut} more tokens)`));
  box.append(head, prompt, tokens);
  return box;
}

function sampleList(samples) {
  const box = document.getElementById("samples");
  if (!box) return;
  const bar = element("div", "find"), search = element("input"), order = element("select"), which = element("select"), count = element("span"), list = element("div");
  search.type = "search";
  search.placeholder = "search prompt, response, answer";
  search.setAttribute("aria-label", search.placeholder);
  order.setAttribute("aria-label", "order");
  which.setAttribute("aria-label", "which");
  for (const [value, text] of [["step", "newest first"], ["low", "lowest reward first"], ["high", "highest reward first"], ["worst", "largest difference first"]])
    order.append(new Option(text, value));
  for (const [value, text] of [["all", "all rewards"], ["good", "reward above 0"], ["bad", "reward 0 or below"]]) which.append(new Option(text, value));
  bar.append(search, which, order, count);
  for (const sample of samples) {
    sample.text = [sample.prompt, sample.pieces.join(""), sample.answer].join("\n").toLowerCase();
    sample.worst = sample.difference ? Math.max(0, ...sample.difference.map(d => Math.abs(d ?? 0))) : null;
  }
  const orders = {step: (a, b) => b.step - a.step, low: (a, b) => a.reward - b.reward, high: (a, b) => b.reward - a.reward,
                  worst: (a, b) => (b.worst ?? -1) - (a.worst ?? -1)};
  const refresh = () => {
    const wanted = search.value.toLowerCase();
    const found = samples.filter(s => s.text.includes(wanted) && (which.value === "all" || (s.reward > 0) === (which.value === "good")));
    list.replaceChildren(...found.sort(orders[order.value]).map(sampleBox));
    count.textContent = `${found.length} of ${samples.length}`;
  };
  for (const control of [search, order, which]) control.addEventListener("input", refresh);
  box.append(bar, list);
  refresh();
}
sampleList(DATA.samples);

// While the run goes on, a page that nobody touches shows what is new; one that lies about for an hour stops.
if (DATA.refresh) {
  let touched = false;
  for (const kind of ["pointerdown", "keydown", "wheel", "touchstart"]) addEventListener(kind, () => { touched = true; }, {passive: true});
  setTimeout(() => { if (!touched && Date.now() - DATA.written * 1000 < 3600e3) location.reload(); }, DATA.refresh * 1000);
}
