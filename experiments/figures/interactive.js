// The callback of every widget of the report; interactive.py passes the models as arguments.
// window.report is the payload, and keeps decoded numbers and the runs under the pointer.
const w = { axis, smoothing, sliders, shown, group, logs, figures, plots, table_source, status,
  map, map_source, map_x, map_y, colors };
const p = window.report, state = p;

async function numbers() {
  if (state.numbers) return state.numbers;
  const bytes = Uint8Array.from(atob(p.data), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return (state.numbers = new Float32Array(await new Response(stream).arrayBuffer()));
}

const against = () => w.axis.value;

function smooth(y, width) {
  if (width <= 1) return y;
  const out = new Float32Array(y.length);
  for (let i = 0; i < y.length; i++) {
    let sum = 0, count = 0;
    for (let j = Math.max(0, i - width + 1); j <= i; j++)
      if (Number.isFinite(y[j])) { sum += y[j]; count++; }
    out[i] = Number.isFinite(y[i]) ? sum / count : NaN;
  }
  return out;
}

function curve(data, run, quantity) {
  const at = run.curves[quantity];
  if (!at) return null;
  const [x, y, n] = at;
  const other = run.axes[against()];
  const from = other && other[1] === n ? other[0] : x;
  return {
    x: data.subarray(from, from + n),
    y: smooth(data.subarray(y, y + n), w.smoothing.value),
  };
}

// Sliders hold one value of a setting each; position 0 is "all".
const included = (run) =>
  w.sliders.every(({ name, value }) => value === 0 || run.settings[name] === p.values[name][value - 1]);

const escaped = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

const text = (value) => (typeof value === "number" ? String(Number(value.toPrecision(6))) : value);

const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];

function bands(groups, data, quantity) {
  const out = { xs: [], ys: [], name: [], color: [], bx: [], by: [], bcolor: [] };
  let k = 0;
  for (const [label, runs] of groups) {
    const at = new Map();
    for (const run of runs) {
      const c = curve(data, run, quantity);
      if (!c) continue;
      for (let i = 0; i < c.x.length; i++) {
        if (!Number.isFinite(c.y[i])) continue;
        if (!at.has(c.x[i])) at.set(c.x[i], []);
        at.get(c.x[i]).push(c.y[i]);
      }
    }
    const xs = [...at.keys()].sort((a, b) => a - b);
    const sorted = xs.map((x) => at.get(x).sort((a, b) => a - b));
    const color = p.palette[k++ % p.palette.length];
    out.xs.push(xs);
    out.ys.push(sorted.map((v) => quantile(v, 0.5)));
    out.name.push(`${label} (median of ${runs.length}, 5-95 %)`);
    out.color.push(color);
    out.bx.push([...xs, ...xs.slice().reverse()]);
    out.by.push([...sorted.map((v) => quantile(v, 0.05)),
      ...sorted.map((v) => quantile(v, 0.95)).reverse()]);
    out.bcolor.push(color);
  }
  return out;
}

function fillMap(runs, data, quantity) {
  const [a, b] = [w.map_x.value, w.map_y.value];
  const cells = new Map();
  for (const run of runs) {
    const c = curve(data, run, quantity);
    const last = c ? c.y[c.y.length - 1] : NaN;
    const key = JSON.stringify([run.settings[a], run.settings[b]]);
    if (!cells.has(key)) cells.set(key, { x: run.settings[a], y: run.settings[b], values: [], runs: [] });
    cells.get(key).values.push(last);
    cells.get(key).runs.push(run.index);
  }
  const rows = [...cells.values()];
  const median = (v) => quantile(v.filter(Number.isFinite).sort((s, t) => s - t), 0.5) ?? NaN;
  const values = rows.map((r) => median(r.values));
  const finite = values.filter(Number.isFinite);
  w.colors.low = Math.min(...finite);
  w.colors.high = Math.max(...finite);
  for (const range of [w.map.x_range, w.map.y_range]) {
    const name = range === w.map.x_range ? a : b;
    range.factors = p.values[name].map(text);
  }
  w.map.below[0].axis_label = a;
  w.map.left[0].axis_label = b;
  w.map_source.data = {
    x: rows.map((r) => text(r.x)), y: rows.map((r) => text(r.y)), value: values,
    count: rows.map((r) => r.runs.length), runs: rows.map((r) => r.runs.join(" ")),
    diverged: rows.map((r) => r.runs.filter((i) => p.runs[i].diverged).length),
  };
}

// The curves and bands of a quantity: of groups of runs, and of single runs.
function drawing(runs, data, quantity) {
  const chosen = new Set(w.table_source.selected.indices);
  const under = state.under ?? new Set();
  let out = { xs: [], ys: [], name: [], color: [], bx: [], by: [], bcolor: [] };
  const single = w.group.value === p.single;
  if (!single) {
    const groups = new Map();
    for (const run of runs) {
      const label = `${w.group.value} ${text(run.settings[w.group.value])}`;
      groups.set(label, [...(groups.get(label) ?? []), run]);
    }
    out = bands(groups, data, quantity);
  }
  const marked = (run) => chosen.has(run.index) || under.has(run.index);
  for (const run of runs) {
    if (!single && !marked(run)) continue;
    if (single && chosen.size && !marked(run)) continue;
    const c = curve(data, run, quantity);
    if (!c) continue;
    out.xs.push(Array.from(c.x));
    out.ys.push(Array.from(c.y, (y) => (Number.isFinite(y) ? y : NaN)));
    out.name.push(run.name + (run.diverged ? " (diverged)" : "") + (run.finished ? "" : " (running)"));
    out.color.push(marked(run) ? "black" : p.palette[run.index % p.palette.length]);
  }
  return out;
}

// The figure of the quantity chosen in panel `k`, on the chosen scales, and what it shows.
function draw(k, runs, data) {
  const quantity = w.shown[k].value, logs = w.logs.active;
  if (quantity === p.none) return [null, null];
  const figure = w.figures[k][(logs.includes(0) ? 1 : 0) + (logs.includes(k + 1) ? 2 : 0)];
  const out = drawing(runs, data, quantity);
  const width = out.xs.map((_, i) => (out.color[i] === "black" ? 2.5 : 1.5));
  const [filled, lines] = figure.renderers.map((renderer) => renderer.data_source);
  filled.data = { xs: out.bx, ys: out.by, color: out.bcolor };
  lines.data = { xs: out.xs, ys: out.ys, name: out.name, color: out.color, width };
  figure.left[0].axis_label = quantity;
  figure.below[0].axis_label = against();
  return [figure, out];
}

async function render() {
  const start = performance.now();
  const data = await numbers(), quantity = w.shown[0].value;
  const runs = p.runs.filter(included);
  const panels = [0, 1].map((k) => draw(k, runs, data));
  const out = panels[0][1], drawn = panels.map(([figure]) => figure).filter((figure) => figure);
  if (drawn.some((figure, k) => figure !== w.plots.children[k]) || drawn.length !== w.plots.children.length)
    w.plots.children = drawn;
  if (w.map) fillMap(runs, data, quantity);
  const last = (run) => { const c = curve(data, run, quantity); return c ? c.y[c.y.length - 1] : NaN; };
  if (state.quantity !== quantity) w.table_source.data = { ...w.table_source.data, last: p.runs.map(last) };
  state.quantity = quantity;
  const names = [...new Map(out.name.map((name, i) => [name, out.color[i]]))].slice(0, 12);
  const legend = names.map(([name, color]) => `<span style="color:${color}">&#9644;</span> ${escaped(name)}`);
  w.status.text = `<b>${runs.length} of ${p.runs.length} runs, ` +
    `${runs.filter((run) => run.diverged).length} diverged</b> &nbsp; ${legend.join(" &nbsp; ")}`;
  state.milliseconds = performance.now() - start;
}

if (source === "map") {
  const inside = cb_data.index.indices;
  const under = inside.length ? w.map_source.data.runs[inside[0]] : "";
  if (under === state.cell) return;
  state.cell = under;
  state.under = new Set(under === "" ? [] : under.split(" ").map(Number));
}
render();
