/* Draws what is visible of the rows, and finds the event under the pointer. What a frame costs depends on its pixels, not
   on the trace: events that share a pixel are drawn as one, and the pointer's mark is laid over a picture that is kept. */

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
    for (const line of this.lines) line.visible = line.lit = undefined;
    this.minimap = null;
    this.draw();
  }

  /* Of a line, what is not hidden, and of that what was searched for: all of it without a search. */
  visible(line) { return line.visible ??= filtered(line.row, this.shown); }
  lit(line) { return line.lit ??= this.matches ? filtered(this.visible(line), this.matches) : this.visible(line); }

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
    this.picture = document.createElement("canvas");
    [this.picture.width, this.picture.height] = [this.canvas.width, this.canvas.height];
    this.minimap = null;
    this.stale = true;
    this.paint();
  }

  draw() {
    this.stale = true;
    this.mark();
  }

  /* After no more has changed than which event is pointed at or selected. */
  mark() {
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
    const { start, end, of } = this.visible(line), time = this.timeAt(x), slack = this.timeAt(x + 2) - time;
    let found = null, nearest = slack;
    for (let i = firstAbove(end, time - slack); i < start.length && start[i] <= time + slack; i++) {
      const distance = Math.max(start[i] - time, time - end[i], 0);
      if (distance < nearest || (distance === 0 && found === null)) [found, nearest] = [i, distance];
      if (nearest === 0) break;
    }
    return found === null ? null : { row: line.row, i: of ? of[found] : found };
  }

  /* The nearest event before or after another in the order of time: of its row, or of all that was searched for. */
  neighbour(here, direction) {
    const order = (a, b) => direction * (a.row.start[a.i] - b.row.start[b.i] || a.row.index - b.row.index || a.i - b.i);
    let best = null;
    for (const line of this.matches || !here ? this.lines : [this.lineOf.get(here.row)]) {
      const { row } = line, { start, of } = this.lit(line);
      if (row.host && !here?.row.host) continue;
      const event = (n) => ({ row, i: of ? of[n] : n });
      let n = direction > 0 ? 0 : start.length - 1;
      if (here) {
        n = firstAbove(start, here.row.start[here.i]);
        if (direction < 0) n -= 1;
        else while (n > 0 && order(event(n - 1), here) > 0) n -= 1;
        while (n >= 0 && n < start.length && order(event(n), here) <= 0) n += direction;
      }
      if (n >= 0 && n < start.length && (!best || order(event(n), best) < 0)) best = event(n);
    }
    return best;
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
    const c = this.canvas.getContext("2d");
    if (this.stale) {
      this.stale = false;
      this.paintPicture();
      this.paintOverview();
    }
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.drawImage(this.picture, 0, 0);
    this.paintMarks(c);
  }

  paintPicture() {
    const c = this.picture.getContext("2d"), top = this.scroller.scrollTop, { css, width, height } = this;
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
  }

  /* The event that is pointed at, and the selected one. */
  paintMarks(c) {
    const { css, width, gutter, height } = this;
    c.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    c.save();
    c.beginPath();
    c.rect(gutter, AXIS, width - gutter, height - AXIS);
    c.clip();
    c.lineWidth = 2;
    for (const [event, colour] of [[this.hovered, css.soft], [this.selected, css.ink]]) {
      if (!event) continue;
      const y = this.lineOf.get(event.row).y - this.scroller.scrollTop;
      const left = Math.max(gutter - 4, this.xOf(event.row.start[event.i])), right = Math.min(width + 4, this.xOf(event.row.end[event.i]));
      c.strokeStyle = colour;
      if (right >= gutter && left <= width) c.strokeRect(left, y + 2, Math.max(2, right - left), ROW - 4);
    }
    c.restore();
  }

  paintRow(c, line) {
    if (this.matches) this.paintEvents(c, line, this.visible(line), false);
    this.paintEvents(c, line, this.lit(line), true);
  }

  paintEvents(c, { y, row }, columns, lit) {
    const { css } = this, { whats } = this.model, colours = this.colouring.ofWhat;
    const alpha = lit ? row.trace > 0 ? 0.62 : 1 : 0.13;
    this.eachRun(columns, this.from, this.to, (left, right, what, cover) => {
      c.globalAlpha = alpha * (this.matches && lit ? 1 : cover);
      c.fillStyle = row.host ? css.line : colours[what];
      c.fillRect(left, y + 2, Math.max(right - left - (right - left > 3 ? 0.75 : 0), 1), ROW - 4);
      if (right - left <= 12) return;
      c.globalAlpha = lit ? 1 : 0.4;
      c.fillStyle = row.host ? css.ink : css["bar-ink"];
      const { short, microbatch } = whats[what];
      this.fitText(c, short, left, y + ROW / 2 + 0.5, right - left, 4, microbatch === null ? "" : String(microbatch), row.trace === 0 && !row.host);
    });
    c.globalAlpha = 1;
  }

  /* Calls draw(left, right, what, cover) for each event of at least a pixel, and once for all that begin in the pixel of a
     narrower one: with what takes most of it, as strong as the share of it that they take. Of many, some are looked at. */
  eachRun({ start, end, what }, from, to, draw) {
    const { gutter, width } = this, scale = (width - gutter) / (to - from), count = start.length;
    const x = (time) => gutter + (time - from) * scale;
    for (let i = firstAbove(end, from); i < count && start[i] < to;) {
      const left = Math.max(gutter, x(start[i])), right = Math.min(width, x(end[i]));
      if (right - left >= 1) {
        draw(left, right, what[i++], 1);
        continue;
      }
      const until = firstAbove(start, from + (Math.floor(left) + 1 - gutter) / scale, i + 1);
      const stride = Math.ceil((until - i) / 32);
      let time = 0, most = -1, longest = 0;
      for (let k = i; k < until; k += stride) {
        const length = Math.min(end[k] - start[k], 1 / scale);
        time += length;
        if (length > longest || most < 0) [most, longest] = [k, length];
      }
      // The last of them may be the one that reaches far beyond.
      const last = until - 1, far = last > i && x(end[last]) - x(start[last]) >= 1;
      draw(Math.floor(left), Math.floor(left) + 1, what[most], Math.min(1, 0.2 + 0.8 * time * stride * scale));
      i = far ? last : until;
    }
  }

  /* Time in which data travels or is waited for and nothing is computed: a tint behind the device's measured rows where
     it is wide enough to be told from its neighbours, and a mark below them that is as dense as the time is. */
  paintExposed(c, tint) {
    c.fillStyle = this.css.exposed;
    for (const { band, start, end } of this.model.exposed) {
      const { top, measured } = this.bands[band];
      if (tint) {
        c.globalAlpha = tint;
        for (let i = firstAbove(end, this.from); i < start.length && start[i] < this.to; i++) {
          const left = Math.max(this.gutter, this.xOf(start[i])), width = Math.min(this.width, this.xOf(end[i])) - left;
          if (width > 1.5) c.fillRect(left, top, width, measured - top);
        }
      } else this.paintDensity(c, start, end, this.from, this.to, measured - 1.5);
    }
    c.globalAlpha = 1;
  }

  /* A line of which each pixel is as strong as the share of its time that the stretches take. */
  paintDensity(c, start, end, from, to, y) {
    const { gutter, width } = this, scale = (width - gutter) / (to - from), density = new Float32Array(Math.ceil(width) + 1);
    for (let i = firstAbove(end, from); i < start.length && start[i] < to; i++) {
      const left = Math.max(gutter, gutter + (start[i] - from) * scale);
      const right = Math.min(width, gutter + (end[i] - from) * scale);
      for (let x = Math.floor(left); x < right; x++) density[x] += Math.min(right, x + 1) - Math.max(left, x);
    }
    for (let x = Math.floor(gutter); x < density.length; x++) {
      if (!density[x]) continue;
      let until = x + 1;
      while (until < density.length && density[until] === density[x]) until++;
      c.globalAlpha = Math.min(1, 0.12 + 0.88 * density[x]);
      c.fillRect(x, y, until - x, 3);
      x = until - 1;
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
      this.lines.forEach((line, n) => {
        this.eachRun(this.lit(line), model.first, model.last, (left, right, what, cover) => {
          m.globalAlpha = cover;
          m.fillStyle = line.row.host ? css.line : this.colouring.ofWhat[what];
          m.fillRect(left, 4 + n * each, Math.max(1, right - left), Math.max(0.6, each - (each > 3 ? 1 : 0)));
        });
        m.globalAlpha = 1;
      });
      m.fillStyle = css.exposed;
      for (const { start, end } of model.exposed) this.paintDensity(m, start, end, model.first, model.last, high - 4);
      m.fillStyle = css.soft;
      m.textBaseline = "middle";
      m.font = "12px system-ui, sans-serif";
      m.fillText("overview", 12, high / 2);
    }
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.drawImage(this.minimap, 0, 0);
    c.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    const left = x(this.from), right = Math.max(left + 2, x(this.to));
    c.globalAlpha = 0.6;
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
  fitText(c, text, left, y, room, margin = 0, instead = "", isKernel = false) {
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
      // Their ends often tell kernels apart: a third of what is left of a name is its end.
      const part = (length) => {
        const tail = isKernel && length > 8 ? Math.floor(length / 3) : 0;
        return `${text.slice(0, length - tail)}\u2026${text.slice(text.length - tail)}`;
      };
      let low = 0, high = text.length;
      while (low < high) {
        const middle = (low + high + 1) >>> 1;
        if (fits(part(middle))) low = middle;
        else high = middle - 1;
      }
      if (low < 3) return;
      text = part(low);
    }
    c.fillText(text, x, y);
  }
}
