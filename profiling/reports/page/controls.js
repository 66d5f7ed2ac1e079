/* What the reader does: pointer, keys, search, legend, tables, and the address that keeps the view. */

const LEGEND = 40;  // entries before the rest is asked for

const element = (id) => document.getElementById(id);

function make(tag, text, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  return made;
}

function start() {
  const model = readModel(JSON.parse(element("data").textContent));
  const canvas = element("timeline"), scroller = element("scroller"), tip = element("tip"), query = element("query");
  const timeline = new Timeline(model, canvas, scroller, element("spacer"), element("overview"));

  /* ---- what is told in words ---- */

  let found = "";
  function status() {
    const { from, to } = timeline, step = to - from < to / 50 ? (to - from) / 100 : 0;  // ends that are close need more digits
    const parts = [`${formatTime(from, step, step ? to : from)} \u2013 ${formatTime(to, step)}`, `${model.count.toLocaleString("en")} ${model.count < model.events ? `longest of ${model.events.toLocaleString("en")} ` : ""}event${model.events === 1 ? "" : "s"}`];
    element("status").textContent = [...parts, found].filter(Boolean).join(" \u00b7 ");
  }

  function search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = words.length ? model.whats.map((what) => words.every((word) => searched(what).includes(word))) : null;
    const { counts, times } = model.totals[0];
    let count = 0, time = 0;
    matches?.forEach((matched, n) => {
      if (matched) [count, time] = [count + counts[n], time + times[n]];
    });
    found = matches ? `${count.toLocaleString("en")} match, ${formatTime(time)}` : "";
    timeline.matches = matches;
    timeline.refresh();
    status();
  }

  function lines({ row, i }) {
    const what = model.whats[row.what[i]];
    const place = [what.phase, what.layer === null ? "" : `layer ${what.layer}`, what.microbatch === null ? "" : `microbatch ${what.microbatch}`];
    return [
      `${formatTime(row.end[i] - row.start[i])} from ${formatTime(row.start[i])}`,
      row.host ? "" : [what.kind, what.group].filter((text, n, all) => text && all.indexOf(text) === n).join(" \u00b7 "),
      place.filter(Boolean).join(" \u00b7 "),
      `${model.bands[row.band]} \u00b7 ${row.label}`,
    ].filter(Boolean);
  }

  function point(event, x, y) {
    if (event || timeline.hovered) timeline.mark();
    timeline.hovered = event;
    tip.hidden = !event;
    if (!event) return;
    tip.replaceChildren(make("b", model.whats[event.row.what[event.i]].name), ...lines(event).map((text) => make("span", text)));
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
  }

  function select(event) {
    timeline.selected = event;
    timeline.mark();
    const details = element("details");
    details.hidden = !event;
    if (event) {
      const { row, i } = event, what = model.whats[row.what[i]];
      const { counts, times } = model.totals[row.trace] ?? model.totals[0];
      let count = 0, time = 0;
      model.whats.forEach((other, n) => {
        if (other.name === what.name) [count, time] = [count + counts[n], time + times[n]];
      });
      const facts = [
        ["start", `${row.start[i].toFixed(3)} \u00b5s`], ["duration", `${(row.end[i] - row.start[i]).toFixed(3)} \u00b5s`],
        ["device", model.bands[row.band]], ["lane", row.label], ["kind", what.kind], ["group", what.group],
        ["phase", what.phase], ["layer", what.layer], ["microbatch", what.microbatch], ["thread blocks", what.blocks],
        ["of this name", `${count}, ${formatTime(time)} in all, ${formatTime(time / count)} each`],
        ["instruction", what.hloOp], ["scope", what.scope],
      ].filter(([, value]) => value !== null && value !== "");
      const list = make("dl");
      for (const [name, value] of facts) {
        const pair = make("div", undefined, { className: name === "scope" ? "wide" : "" });
        pair.append(make("dt", name), make("dd", String(value)));
        list.append(pair);
      }
      details.replaceChildren(make("h3", what.name), list);
    }
    keep();
  }

  function legend(all = false) {
    const { categories, colours } = timeline.colouring, more = categories.length - LEGEND;
    const shown = all || more < 2 ? categories : categories.slice(0, LEGEND);
    element("legend").replaceChildren(...shown.map(([name, time]) => {
      const label = { kind: name, group: name, phase: name }[timeline.colouring.field] ?? `${timeline.colouring.field} ${name}`;
      const button = make("button", undefined, { type: "button" }), swatch = make("i");
      swatch.style.background = colours.get(name);
      button.setAttribute("aria-pressed", String(!timeline.hidden.has(name)));
      button.append(swatch, label, make("small", time ? formatTime(time) : "predicted"));
      button.addEventListener("click", () => {
        if (!timeline.hidden.delete(name)) timeline.hidden.add(name);
        button.setAttribute("aria-pressed", String(!timeline.hidden.has(name)));
        timeline.refresh();
        keep();
      });
      return button;
    }));
    if (shown === categories) return;
    const rest = make("button", `and ${more} more`, { type: "button" });
    rest.addEventListener("click", () => legend(true));
    element("legend").append(rest);
  }

  function step(direction) {
    const best = timeline.neighbour(timeline.selected, direction);
    if (!best) return;
    timeline.reveal(best);
    select(best);
  }

  let turn = 0, exposed;
  const anyExposed = model.exposed.some(({ start }) => start.length);
  function nextExposed() {
    if (!anyExposed) return;
    exposed ??= model.exposed.flatMap(({ start, end }) => Array.from(start, (from, i) => [from, end[i]]))
      .sort((a, b) => b[1] - b[0] - (a[1] - a[0]));
    zoomTo(...exposed[turn++ % exposed.length]);
  }

  /* Measured events of one name and kind, the longest first. */
  function occurrences(name, kind) {
    const wanted = model.whats.map((what) => what.name === name && what.kind === kind);
    const all = [];
    for (const row of model.rows) {
      if (row.host || row.trace > 0) continue;
      for (let i = 0; i < row.what.length; i++) if (wanted[row.what[i]]) all.push({ row, i });
    }
    const time = ({ row, i }) => row.end[i] - row.start[i];
    return all.sort((a, b) => time(b) - time(a));
  }

  function zoomTo(from, to) {
    const margin = Math.max((to - from) * 2, 5);
    timeline.show(from - margin, to + margin);
  }

  /* ---- the address: what was read from it is shown, what is shown can be sent to others ---- */

  let wait;
  function keep() {
    clearTimeout(wait);
    wait = setTimeout(() => {
      const state = new URLSearchParams();
      if (!timeline.whole) state.set("view", `${timeline.from.toFixed(3)},${timeline.to.toFixed(3)}`);
      if (query.value) state.set("find", query.value);
      if (element("colour").value !== usual) state.set("colour", element("colour").value);
      for (const name of timeline.hidden) state.append("hide", name);
      if (timeline.selected) state.set("event", `${timeline.selected.row.index},${timeline.selected.i}`);
      history.replaceState(null, "", `#${state}`);
    }, 150);
  }

  /* Phases are what a prediction has in common with a measurement, and what tells apart events that are of one kind. */
  const different = (field) => new Set(model.whats.filter((what) => what.group !== "step").map((what) => what[field])).size;
  const predicted = model.rows.some((row) => row.trace > 0);
  const usual = different("phase") > 1 && (predicted || different("kind") < 2) ? "phase" : "kind";

  for (const option of element("colour").options) {
    option.disabled = !model.whats.some((what) => what.group !== "step" && what[option.value] !== null && what[option.value] !== "");
  }

  function restore() {
    const state = new URLSearchParams(location.hash.slice(1));
    const [from, to] = (state.get("view") || "").split(",").map(Number);
    const [row, i] = (state.get("event") || "").split(",").map(Number);
    element("colour").value = state.get("colour") || usual;
    if (!element("colour").value) element("colour").value = usual;
    query.value = state.get("find") || "";
    timeline.recolour(element("colour").value);
    timeline.hidden = new Set(state.getAll("hide"));
    legend();
    search(query.value);
    if (from < to) timeline.show(from, to);
    else timeline.show(model.first, model.last);
    if (state.get("event") && model.rows[row] && i < model.rows[row].start.length) select({ row: model.rows[row], i });
  }

  /* ---- pointer ---- */

  const pointers = new Map();
  let moved = 0;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("wheel", (event) => {
    const unit = event.deltaMode === 1 ? 16 : 1, [x] = place(event);
    const sideways = event.shiftKey ? event.deltaY || event.deltaX : Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : 0;
    if (!sideways && event.deltaY > 0 && timeline.whole) return;  // nothing left to show: the page scrolls
    event.preventDefault();
    if (sideways) timeline.pan(sideways * unit);
    else timeline.zoom(Math.exp(Math.max(-120, Math.min(120, event.deltaY * unit)) * 0.0022), Math.max(timeline.gutter, x));
    point(null);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    if (pointers.size === 1) moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = place(event), before = pointers.get(event.pointerId);
    if (!before) {
      point(timeline.at(x, y), event.clientX, event.clientY);
      return;
    }
    pointers.set(event.pointerId, [x, y]);
    moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      const ratio = Math.abs(before[0] - other[0]) / Math.max(8, Math.abs(x - other[0]));
      timeline.zoom(Math.max(0.5, Math.min(2, ratio)), other[0]);
    } else if (moved > 3) {
      canvas.classList.add("dragging");
      point(null);
      timeline.pan(before[0] - x);
      scroller.scrollTop += before[1] - y;
    }
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => {
    if (pointers.delete(event.pointerId) && moved <= 3 && name === "pointerup") select(timeline.at(...place(event)));
    if (!pointers.size) canvas.classList.remove("dragging");
  });
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("dblclick", (event) => {
    const found = timeline.at(...place(event));
    if (found) zoomTo(found.row.start[found.i], found.row.end[found.i]);
  });
  scroller.addEventListener("scroll", () => timeline.draw());

  const overview = element("overview");
  const jump = (event) => {
    const box = overview.getBoundingClientRect(), half = (timeline.to - timeline.from) / 2;
    const share = (event.clientX - box.left - timeline.gutter) / (timeline.width - timeline.gutter);
    const time = model.first + share * (model.last - model.first);
    timeline.show(time - half, time + half);
  };
  overview.addEventListener("pointerdown", (event) => { overview.setPointerCapture(event.pointerId); jump(event); });
  overview.addEventListener("pointermove", (event) => { if (event.buttons) jump(event); });

  /* ---- keys and buttons ---- */

  const actions = {
    w: () => timeline.zoom(0.7), ArrowUp: () => timeline.zoom(0.7), "+": () => timeline.zoom(0.7),
    s: () => timeline.zoom(1 / 0.7), ArrowDown: () => timeline.zoom(1 / 0.7), "-": () => timeline.zoom(1 / 0.7),
    a: () => timeline.pan(-120), ArrowLeft: () => timeline.pan(-120),
    d: () => timeline.pan(120), ArrowRight: () => timeline.pan(120),
    0: () => timeline.show(model.first, model.last), Home: () => timeline.show(model.first, model.last),
    ",": () => step(-1), ".": () => step(1), e: nextExposed, "/": () => query.focus(),
    Escape: () => { select(null); point(null); },
  };
  const typing = (target) => /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    const moves = /^(Arrow|Home)/.test(event.key);
    if (!Object.hasOwn(actions, event.key) || (moves && event.target !== canvas)) return;
    event.preventDefault();
    actions[event.key]();
  });
  element("in").addEventListener("click", actions.w);
  element("out").addEventListener("click", actions.s);
  element("fit").addEventListener("click", actions[0]);
  element("exposed").addEventListener("click", nextExposed);
  element("exposed").disabled = !anyExposed;
  query.addEventListener("input", () => { search(query.value); keep(); });
  query.addEventListener("keydown", (event) => {
    if (event.key === "Enter") step(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") { query.value = ""; search(""); keep(); canvas.focus(); }
  });
  element("colour").addEventListener("change", (event) => {
    timeline.recolour(event.target.value);
    legend();
    keep();
  });

  /* ---- tables ---- */

  for (const table of document.querySelectorAll("table")) {
    const shares = [...table.querySelectorAll("td.share")].map((cell) => [cell, Number(cell.dataset.value)]);
    const most = Math.max(...shares.map(([, share]) => share));
    for (const [cell, share] of shares) cell.style.setProperty("--share", `${Math.max(0, 100 * share / most)}%`);
  }
  /* A button in a cell of its own at a row's end, which brings what the row tells of into the timeline. */
  function shows(row, title, show) {
    const button = make("button", "show", { type: "button", className: "go", title });
    button.setAttribute("aria-label", `show ${row.cells[0].textContent}`);
    button.addEventListener("click", () => {
      show();
      canvas.scrollIntoView({ block: "nearest" });
      canvas.focus({ preventScroll: true });
    });
    const cell = make("td");
    cell.append(button);
    row.append(cell);
  }
  for (const row of document.querySelectorAll("tr[data-from]")) {
    shows(row, "Show it in the timeline", () => zoomTo(Number(row.dataset.from), Number(row.dataset.to)));
  }
  for (const row of document.querySelectorAll("tr[data-event]")) {
    let all, next = 0;
    shows(row, "Show the longest in the timeline; press again for the next longest", () => {
      all ??= occurrences(row.dataset.event, row.dataset.kind);
      if (!all.length) return;
      const event = all[next++ % all.length], what = model.whats[event.row.what[event.i]];
      if (timeline.hidden.delete(timeline.colouring.category(what))) {
        timeline.refresh();
        legend();
      }
      zoomTo(event.row.start[event.i], event.row.end[event.i]);
      timeline.reveal(event);
      select(event);
    });
  }
  document.querySelectorAll("table").forEach(sortable);
  for (const table of document.querySelectorAll("table:has(.go)")) {
    const head = make("th");
    head.append(make("span", "show", { className: "unseen" }));
    table.tHead.rows[0].append(head);
  }

  timeline.changed = () => { status(); keep(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { timeline.theme(); legend(); });
  new ResizeObserver(() => timeline.resize()).observe(scroller);
  addEventListener("hashchange", restore);
  timeline.resize();
  restore();
}

/* Press a column's head to sort by it: numbers from the largest, texts from A; what has no value comes last. */
function sortable(table) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", head.textContent, { type: "button" });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = !head.classList.contains("text");
      const before = head.getAttribute("aria-sort");
      const order = before ? (before === "descending" ? "ascending" : "descending") : numeric ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const keys = new Map([...body.rows].map((row) => [row, row.cells[column].dataset.value ?? row.cells[column].textContent]));
      const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * compare(x, y);
      }));
    });
  });
}

start();
