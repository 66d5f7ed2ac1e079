/* The embedded data as typed arrays, and everything that is computed once. Times are microseconds. */

function readModel(data) {
  const text = data.strings;
  const whats = data.whats.map(([name, kind, group, phase, layer, microbatch, scope, hloOp, blocks]) => ({
    name: text[name], short: (data.labels[name] ?? text[name]).replace(/^(?:\w+::)+(?=\w)/, ""), kind: text[kind], group: text[group], phase: text[phase],
    layer, microbatch, scope: text[scope], hloOp: text[hloOp], blocks,
  }));
  const rows = data.rows.map((row, index) => {
    const count = row.duration.length;
    const start = new Float64Array(count), end = new Float64Array(count);
    for (let i = 0, time = 0; i < count; i++) {
      time += row.start[i];
      start[i] = time / 1000;
      end[i] = (time + row.duration[i]) / 1000;
    }
    return { label: row.label, band: row.band, trace: row.trace, host: row.host, index, start, end, what: Uint32Array.from(row.what) };
  });
  let first = Infinity, last = -Infinity, count = 0;
  const totals = [];  // of each trace, of each what: how many events and how much time
  for (const row of rows) {
    if (!row.start.length) continue;
    first = Math.min(first, row.start[0]);
    last = Math.max(last, row.end[row.end.length - 1]);
    if (row.host) continue;
    if (row.trace === 0) count += row.start.length;
    const { counts, times } = totals[row.trace] ??= { counts: new Uint32Array(whats.length), times: new Float64Array(whats.length) };
    for (let i = 0; i < row.what.length; i++) {
      counts[row.what[i]] += 1;
      times[row.what[i]] += row.end[i] - row.start[i];
    }
  }
  totals[0] ??= { counts: new Uint32Array(whats.length), times: new Float64Array(whats.length) };
  if (!(first < last)) [first, last] = Number.isFinite(first) ? [first, first + 1] : [0, 1];
  return { rows, whats, first, last, count, events: data.events, totals, bands: data.bands, exposed: data.exposed.map(readSpans) };
}

function readSpans(edges, band) {
  const start = new Float64Array(edges.length / 2), end = new Float64Array(edges.length / 2);
  for (let i = 0, time = 0; i < edges.length; i += 2) {
    start[i / 2] = (time + edges[i]) / 1000;
    time += edges[i] + edges[i + 1];
    end[i / 2] = time / 1000;
  }
  return { band, start, end };
}

/* What is searched in: made when it is asked for first, as most pages are never searched. */
function searched(what) {
  what.searched ??= [
    what.name, what.kind, what.group, what.phase, what.scope, what.hloOp,
    what.layer === null ? "" : `layer:${what.layer}`, what.microbatch === null ? "" : `microbatch:${what.microbatch}`,
  ].join("\n").toLowerCase();
  return what.searched;
}

/* The events of a row of which this holds, as columns of their own; `of` says which they are. */
function filtered(row, holds) {
  let count = 0;
  for (let i = 0; i < row.what.length; i++) count += holds[row.what[i]] ? 1 : 0;
  if (count === row.what.length) return row;
  const found = { start: new Float64Array(count), end: new Float64Array(count), what: new Uint32Array(count), of: new Uint32Array(count) };
  for (let i = 0, n = 0; i < row.what.length; i++) {
    if (!holds[row.what[i]]) continue;
    found.start[n] = row.start[i];
    found.end[n] = row.end[i];
    found.what[n] = row.what[i];
    found.of[n++] = row.of ? row.of[i] : i;
  }
  return found;
}

/* Index of the first element of a sorted array that is greater than a value. */
function firstAbove(sorted, value, low = 0) {
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (sorted[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

/* Times that stand beside each other share the unit of the largest, and show the digits that their step needs. */
function formatTime(microseconds, step = 0, largest = microseconds) {
  const size = Math.abs(largest);
  const [unit, name] = size >= 1e6 ? [1e6, "s"] : size >= 1000 ? [1000, "ms"] : [1, "\u00b5s"];
  const digits = step ? Math.max(0, Math.min(6, Math.ceil(-Math.log10(step / unit) - 1e-9))) : size >= 100 * unit ? 1 : 2;
  return `${(microseconds / unit).toFixed(digits)} ${name}`;
}

/* Colours by what an event is: each group has a stretch of hues, and its most used categories take it in turn. */
const HUES = { compute: [140, 300], transfer: [12, 62], wait: [322, 352], unclassified: [60, 90] };
const PASSES = { F: 38, FB: 92, B: 128, I: 212, W: 266 };

class Colouring {
  constructor(model, field, lightness) {
    this.field = field;
    const usage = new Map();
    const use = (what, time) => {
      const name = this.category(what);
      if (name === null) return;
      const found = usage.get(name) || { time: 0, groups: {} };
      found.time += time;
      found.groups[what.group] = (found.groups[what.group] || 0) + time;
      usage.set(name, found);
    };
    model.whats.forEach((what, n) => use(what, model.totals[0].times[n]));  // what is predicted alone has a colour too
    const turns = {};
    this.colours = new Map();
    this.categories = [...usage].map(([name, { time }]) => [name, time]).sort((a, b) => b[1] - a[1]);
    for (const [name] of this.categories) {
      const { groups } = usage.get(name);
      const group = Object.keys(groups).sort((a, b) => groups[b] - groups[a])[0];
      turns[group] = (turns[group] ?? -1) + 1;
      this.colours.set(name, this.colour(name, group, turns[group], lightness));
    }
    this.ofWhat = model.whats.map((what) => this.colours.get(this.category(what)) || `hsl(220 8% ${lightness})`);
  }

  category(what) {
    if (what.group === "step") return null;
    const value = what[this.field];
    return value === null || value === "" ? "none" : String(value);
  }

  colour(name, group, turn, lightness) {
    const pass = /(?:^|\()([FBIW]{1,2})\)?$/.exec(name);
    if (name === "none" || group === "control") return `hsl(220 8% ${lightness})`;
    if (this.field === "layer" || this.field === "microbatch") return `hsl(${(Number(name) * 47 + 200) % 360} 55% ${lightness})`;
    if (pass && name === pass[1]) return `hsl(${PASSES[name] ?? 200} 62% ${lightness})`;
    const [low, high] = HUES[group] || HUES.unclassified;
    const hue = low + (high - low) * ((turn * 0.618034 + 0.28) % 1);
    return `hsl(${hue} ${[66, 48, 80][turn % 3]}% ${parseFloat(lightness) - [0, 6][turn % 2]}%)`;
  }
}
