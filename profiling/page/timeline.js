/* Draws what is visible of the rows, and finds the event under the pointer. */

const ROW = 22, HEADER = 22, AXIS = 26, GAP = 6;

class Timeline {
  constructor(model, canvas, scroller, spacer, overview) {
    Object.assign(this, { model, canvas, scroller, spacer, overview });
    this.from = model.first;
    this.to = model.last;
    this.hidden = new Set();
    this.matches = null;
    this.selected = this.hovered = null;
    this.changed = () => {};
    this.lines = [];
    this.bands = [];
    let y = AXIS;
    const headed = model.rows.length > model.bands.length;
    model.bands.forEach((label, band) => {
      const rows = model.rows.filter((row) => row.band === band);
      const top = y;
      if (headed) y += HEADER;
      let measured = y;
      for (const row of rows) {
        this.lines.push({ y, row, label: headed ? row.label : label });
        y += ROW;
        if (row.trace === 0) measured = y;
      }
      this.bands.push({ top, measured, bottom: y, label: headed ? label : "" });
      y += headed ? GAP : 0;
    });
    this.total = y + 4;
    this.lineOf = new Map(this.lines.map((line) => [line.row, line]));
    this.theme();
  }

  theme() {
    const style = getComputedStyle(document.documentElement);
    this.css = Object.fromEntries(
      ["panel", "ink", "soft", "line", "band", "faint", "accent", "exposed", "bar-ink", "lightness"].map((name) => [
        name, style.getPropertyValue(`--${name}`).trim(),
      ]));
    this.recolour(this.colouring ? this.colouring.field : "kind");
  }

  recolour(field) {
    this.colouring = new Colouring(this.model, field, this.css.lightness);
    this.hidden.clear();
    this.refresh();
  }

  /* After what is shown or how has changed, not only from where to where. */
  refresh() {
    this.shown = this.model.whats.map((what) => !this.hidden.has(this.colouring.category(what)));
    this.minimap = null;
    this.draw();
  }

  resize() {
    const width = this.scroller.clientWidth;
    this.gutter = width < 620 ? 108 : 168;
    this.width = width;
    this.height = Math.min(this.total, this.scroller.clientHeight || this.total);
    this.spacer.style.height = `${Math.max(0, this.total - this.height)}px`;
    for (const [canvas, height] of [[this.canvas, this.height], [this.overview, 40]]) {
      canvas.width = Math.round(width * devicePixelRatio);
      canvas.height = Math.round(height * devicePixelRatio);
      canvas.style.height = `${height}px`;
    }
    this.minimap = null;
    this.paint();
  }

  draw() {
    this.pending ??= requestAnimationFrame(() => { this.pending = undefined; this.paint(); });
  }

  /* Moves the view, never beyond the trace nor closer than a few nanoseconds. */
  show(from, to) {
    const { first, last } = this.model;
    const length = Math.min(last - first, Math.max(to - from, 0.02));
    this.from = Math.max(first, Math.min(from, last - length));
    this.to = this.from + length;
    this.draw();
    this.changed();
  }

  zoom(factor, x = (this.gutter + this.width) / 2) {
    const time = this.timeAt(x);
    this.show(time - (time - this.from) * factor, time + (this.to - time) * factor);
  }

  pan(pixels) {
    const time = pixels * (this.to - this.from) / (this.width - this.gutter);
    this.show(this.from + time, this.to + time);
  }

  get whole() { return this.to - this.from >= (this.model.last - this.model.first) * 0.9999; }
  timeAt(x) { return this.from + (x - this.gutter) / (this.width - this.gutter) * (this.to - this.from); }
  xOf(time) { return this.gutter + (time - this.from) / (this.to - this.from) * (this.width - this.gutter); }

  /* The event at a place of the canvas: the one there, or one that is too narrow to be hit and within two pixels. */
  at(x, y) {
    const line = this.lines.find((line) => y + this.scroller.scrollTop >= line.y && y + this.scroller.scrollTop < line.y + ROW);
    if (!line || x < this.gutter || y < AXIS) return null;
    const { row } = line, time = this.timeAt(x), slack = this.timeAt(x + 2) - time;
    let found = null, nearest = slack;
    for (let i = firstAbove(row.end, time - slack); i < row.start.length && row.start[i] <= time + slack; i++) {
      if (!this.shown[row.what[i]]) continue;
      const distance = Math.max(row.start[i] - time, time - row.end[i], 0);
      if (distance < nearest || (distance === 0 && found === null)) [found, nearest] = [i, distance];
    }
    return found === null ? null : { row, i: found };
  }

  reveal(event) {
    const line = this.lineOf.get(event.row), { scroller } = this;
    const start = event.row.start[event.i], end = event.row.end[event.i], length = this.to - this.from;
    if (line.y < scroller.scrollTop + AXIS || line.y + ROW > scroller.scrollTop + this.height) scroller.scrollTop = line.y - this.height / 2;
    if (end - start > length) this.show(start, end);
    else if (start < this.from || end > this.to) this.show((start + end - length) / 2, (start + end + length) / 2);
    this.draw();
  }

  paint() {
    if (!this.width) return;
    const c = this.canvas.getContext("2d"), top = this.scroller.scrollTop, { css, width, height, gutter } = this;
    c.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    c.fillStyle = css.panel;
    c.fillRect(0, 0, width, height);
    c.textBaseline = "middle";
    const ticks = this.ticks();
    c.save();
    c.translate(0, -top);
    for (const band of this.bands) {
      c.fillStyle = css.band;
      c.fillRect(0, band.top, width, band.bottom - band.top);
    }
    c.fillStyle = css.line;
    for (const [x] of ticks.marks) c.fillRect(Math.round(x), top, 1, height);
    const visible = this.lines.filter((line) => line.y < top + height && line.y + ROW > top);
    this.paintExposed(c, 0.16);
    c.font = "11px system-ui, sans-serif";
    for (const line of visible) this.paintRow(c, line);
    this.paintExposed(c, 0);
    this.paintLabels(c, visible);
    c.restore();
    this.paintAxis(c, ticks);
    this.paintOverview();
  }

  paintRow(c, { y, row }) {
    const { css, gutter, width, colouring, matches, shown, from, to } = this;
    const scale = (width - gutter) / (to - from), dim = row.trace > 0 ? 0.62 : 1;
    const colours = colouring.ofWhat;
    let reach = -1, before = -1;  // the last pixel that is covered, and whose colour it has
    for (let i = firstAbove(row.end, from); i < row.start.length && row.start[i] < to; i++) {
      const what = row.what[i];
      if (!shown[what]) continue;
      const lit = !matches || matches[what];
      const left = Math.max(gutter, gutter + (row.start[i] - from) * scale);
      const right = Math.min(width, gutter + (row.end[i] - from) * scale);
      // What lies within a pixel that is covered already is not drawn again, unless it is what was searched for.
      if (right <= reach && !(matches && lit && before !== what)) continue;
      const wide = Math.max(right - left - (right - left > 3 ? 0.75 : 0), 1);
      c.globalAlpha = lit ? dim : 0.13;
      c.fillStyle = row.host ? css.line : colours[what];
      c.fillRect(left, y + 2, wide, ROW - 4);
      reach = Math.max(reach, Math.floor(left) + 1, right);
      before = what;
      if (right - left > 12) {
        c.globalAlpha = lit ? 1 : 0.4;
        c.fillStyle = row.host ? css.ink : css["bar-ink"];
        const { short, microbatch } = this.model.whats[what];
        this.fitText(c, short, left, y + ROW / 2 + 0.5, right - left, 4, microbatch === null ? "" : String(microbatch));
      }
    }
    c.globalAlpha = 1;
    for (const [event, colour] of [[this.hovered, css.soft], [this.selected, css.accent]]) {
      if (!event || event.row !== row) continue;
      const left = Math.max(gutter, this.xOf(row.start[event.i])), right = Math.min(width, this.xOf(row.end[event.i]));
      c.strokeStyle = colour;
      c.lineWidth = 2;
      if (right >= gutter && left <= width) c.strokeRect(left, y + 2, Math.max(2, right - left), ROW - 4);
    }
  }

  /* Time in which data travels or is waited for and nothing is computed: a tint behind the device's measured rows where
     it is wide enough to be told from its neighbours, and a mark below them that is as dense as the time is. */
  paintExposed(c, tint) {
    c.fillStyle = this.css.exposed;
    c.globalAlpha = tint || 1;
    for (const { band, start, end } of this.model.exposed) {
      if (end < this.from || start > this.to) continue;
      const { top, measured } = this.bands[band];
      const left = Math.max(this.gutter, this.xOf(start)), width = Math.min(this.width, this.xOf(end)) - left;
      if (!tint) c.fillRect(left, measured - 1.5, Math.max(0.3, width), 3);
      else if (width > 1.5) c.fillRect(left, top, width, measured - top);
    }
    c.globalAlpha = 1;
  }

  paintLabels(c, visible) {
    const { css, gutter } = this;
    c.fillStyle = css.panel;
    c.fillRect(0, 0, gutter, this.total);
    for (const band of this.bands) {
      c.fillStyle = css.band;
      c.fillRect(0, band.top, gutter, band.bottom - band.top);
      c.fillStyle = css.ink;
      c.font = "600 12px system-ui, sans-serif";
      if (band.label) this.fitText(c, band.label, 12, band.top + HEADER / 2 + 1, this.width - 24);
    }
    c.font = "12px system-ui, sans-serif";
    for (const { y, row, label } of visible) {
      c.fillStyle = row.trace > 0 ? css.soft : css.ink;
      this.fitText(c, label, this.bands[row.band].label ? 22 : 12, y + ROW / 2 + 0.5, gutter - 28);
    }
    c.fillStyle = css.line;
    c.fillRect(gutter - 1, 0, 1, this.total);
  }

  ticks() {
    const length = this.to - this.from, room = Math.max(1, Math.floor((this.width - this.gutter) / 110));
    const rough = length / room, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) || 10 * power;
    const marks = [];
    for (let k = Math.ceil(this.from / step); k * step <= this.to; k++) marks.push([this.xOf(k * step), k * step]);
    return { step, marks };
  }

  paintAxis(c, { step, marks }) {
    const { css, width, gutter } = this;
    c.fillStyle = css.panel;
    c.fillRect(0, 0, width, AXIS);
    c.fillStyle = css.line;
    c.fillRect(0, AXIS - 1, width, 1);
    c.font = "11px system-ui, sans-serif";
    for (const [x, time] of marks) {
      c.fillStyle = css.line;
      c.fillRect(Math.round(x), AXIS - 7, 1, 7);
      c.fillStyle = css.soft;
      const label = formatTime(time, step, this.to), wide = c.measureText(label).width;
      if (x + 4 + wide < width) c.fillText(label, x + 4, AXIS / 2);
    }
    c.fillStyle = css.soft;
    c.fillText("exposed", 26, AXIS / 2);
    c.fillStyle = css.exposed;
    c.fillRect(12, AXIS / 2 - 1, 9, 3);
    c.fillStyle = css.line;
    c.fillRect(gutter - 1, 0, 1, AXIS);
  }

  /* The whole trace in a strip, and where in it the view lies; the rows are drawn once and kept. */
  paintOverview() {
    const c = this.overview.getContext("2d"), { css, width, gutter, model } = this, high = 40;
    const scale = (width - gutter) / (model.last - model.first), x = (time) => gutter + (time - model.first) * scale;
    if (!this.minimap) {
      this.minimap = document.createElement("canvas");
      [this.minimap.width, this.minimap.height] = [this.overview.width, this.overview.height];
      const m = this.minimap.getContext("2d"), each = (high - 10) / this.lines.length;
      m.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
      m.fillStyle = css.panel;
      m.fillRect(0, 0, width, high);
      this.lines.forEach(({ row }, n) => {
        let reach = -1;
        for (let i = 0; i < row.start.length; i++) {
          const left = x(row.start[i]), right = x(row.end[i]);
          if (right <= reach || !this.shown[row.what[i]] || (this.matches && !this.matches[row.what[i]])) continue;
          m.fillStyle = row.host ? css.line : this.colouring.ofWhat[row.what[i]];
          m.fillRect(left, 4 + n * each, Math.max(1, right - left), Math.max(0.6, each - (each > 3 ? 1 : 0)));
          reach = Math.max(left + 1, right);
        }
      });
      m.fillStyle = css.exposed;
      for (const { start, end } of model.exposed) m.fillRect(x(start), high - 4, Math.max(0.3, (end - start) * scale), 3);
      m.fillStyle = css.soft;
      m.textBaseline = "middle";
      m.font = "12px system-ui, sans-serif";
      m.fillText("overview", 12, high / 2);
    }
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.drawImage(this.minimap, 0, 0);
    c.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    const left = x(this.from), right = Math.max(left + 2, x(this.to));
    c.globalAlpha = 0.72;
    c.fillStyle = css.panel;
    c.fillRect(gutter, 0, left - gutter, high);
    c.fillRect(right, 0, width - right, high);
    c.globalAlpha = 1;
    c.strokeStyle = css.accent;
    c.lineWidth = 1.5;
    c.strokeRect(left + 0.75, 1, Math.max(1, right - left - 1.5), high - 2);
  }

  /* A text if it fits into a width, or else another one in the middle, or else as much of the first as fits, found by
     halving. Widths are kept, as measuring is what takes time. */
  fitText(c, text, left, y, room, margin = 0, instead = "") {
    this.widths ??= new Map();
    const width = (part) => {
      const key = `${c.font}|${part}`;
      if (!this.widths.has(key)) {
        if (this.widths.size > 20000) this.widths.clear();
        this.widths.set(key, c.measureText(part).width);
      }
      return this.widths.get(key);
    };
    let x = left + margin;
    const fits = (part) => width(part) <= room - 2 * margin;
    if (!fits(text) && instead && width(instead) <= room - 2) {
      text = instead;
      x = left + (room - width(text)) / 2;
    } else if (!fits(text)) {
      let low = 0, high = text.length;
      while (low < high) {
        const middle = (low + high + 1) >>> 1;
        if (fits(`${text.slice(0, middle)}\u2026`)) low = middle;
        else high = middle - 1;
      }
      if (low < 3) return;
      text = `${text.slice(0, low)}\u2026`;
    }
    c.fillText(text, x, y);
  }
}
