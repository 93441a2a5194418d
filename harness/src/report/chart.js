// Charts: values under the pointer and by the arrow keys, and a switch for each series.
"use strict";

const all = (what, from = document) => [...from.querySelectorAll(what)];

const make = (tag, name = "", text = "") =>
  Object.assign(document.createElement(tag), { className: name, textContent: text });

/** About four significant digits: 1,840, 0.3121, 2.14e-3. */
function show(value) {
  const size = Math.abs(value);
  if (size >= 999.5) return Math.round(value).toLocaleString("en-US");
  if (size > 0 && size < 0.01) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(+value.toFixed(size >= 99.95 ? 1 : 4));
}

class Chart {
  static all = [];

  constructor(figure) {
    this.figure = figure;
    this.plot = figure.querySelector(".plot");
    this.data = JSON.parse(figure.querySelector("script").textContent);
    this.cloud = figure.classList.contains("square");
    this.cursor = this.plot.appendChild(make("div", "cursor"));
    this.tip = this.plot.appendChild(make("div", "tip"));
    this.status = figure.appendChild(make("div", "unseen"));
    this.status.setAttribute("role", "status");
    this.spots = [];
    this.at = -1;
    this.groups = this.data.series.map((_, i) => this.plot.querySelector(`g[data-series="${i}"]`));
    this.setScales();
    this.listen();
    this.addSwitches();
    this.clear();
    Chart.all.push(this);
  }

  /** Shares of the plot's width and height at which values stand. */
  setScales() {
    const [x0, x1, xKind, y0, y1, yKind] = this.plot.dataset.scale.split(" ");
    const share = (low, high, kind) => value =>
      kind === "log" ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    this.across = share(x0, x1, xKind);
    this.up = share(y0, y1, yKind);
  }

  /** Series that are not switched off, each with its number. */
  shown() {
    const series = this.data.series.map((one, i) => ({ ...one, i }));
    return series.filter(one => this.groups[one.i].style.display !== "none");
  }

  /** What the arrow keys go through: points of a cloud, or x's. */
  stops() {
    if (this.cloud) return this.shown().flatMap(series => series.x.map((_, k) => ({ series, k })));
    return [...new Set(this.shown().flatMap(series => series.x))].sort((a, b) => a - b);
  }

  /** The point of each series that is nearest to x, unless it is farther away than a fiftieth of the width. */
  pointsAt(x) {
    const distance = value => Math.abs(this.across(value) - this.across(x));
    const nearest = series =>
      series.x.reduce((best, value, k) => (distance(value) < distance(series.x[best]) ? k : best), 0);
    return this.shown()
      .map(series => ({ series, k: nearest(series) }))
      .filter(({ series, k }) => distance(series.x[k]) < 0.02);
  }

  clear() {
    this.cursor.hidden = this.tip.hidden = true;
    this.spots.splice(0).forEach(spot => spot.remove());
  }

  /** Shows points: a mark on each, and their values beside the first. */
  mark(points, heading) {
    this.clear();
    if (!points.length) return;
    const left = this.across(points[0].series.x[points[0].k]);
    this.cursor.hidden = this.cloud;
    this.cursor.style.left = `${100 * left}%`;
    for (const { series, k } of points) {
      const spot = this.plot.appendChild(make("div", `spot s${series.i % 8}`));
      spot.style.left = `${100 * this.across(series.x[k])}%`;
      spot.style.bottom = `${100 * this.up(series.y[k])}%`;
      this.spots.push(spot);
    }
    this.tip.hidden = false;
    this.tip.replaceChildren(...(heading ? [make("b", "", heading)] : []), ...points.map(point => this.line(point)));
    // On the side with more room, and within the plot.
    const width = this.plot.clientWidth;
    const wanted = left * width + (left > 0.5 ? -this.tip.offsetWidth - 12 : 12);
    this.tip.style.left = `${Math.max(0, Math.min(wanted, width - this.tip.offsetWidth))}px`;
    this.status.textContent = this.tip.innerText;
  }

  line({ series, k }) {
    const name = this.data.series.length > 1 ? `${series.name}: ` : "";
    let text = series.note ? series.note[k] : name + show(series.y[k]);
    if (series.error?.[k]) text += ` ± ${show(series.error[k])}`;
    if (series.mean) text += `, running mean ${show(series.mean[k])}`;
    const row = make("div", `s${series.i % 8}`);
    row.append(make("i"), make("span", "ink", text));
    return row;
  }

  see(x) {
    const points = this.pointsAt(x);
    this.mark(points, points.length ? `${this.data.x} ${show(points[0].series.x[points[0].k])}` : "");
  }

  /** This chart and those that show their values with it. */
  together() {
    const group = this.figure.dataset.group;
    return group ? Chart.all.filter(chart => chart.figure.dataset.group === group) : [this];
  }

  leave() {
    this.together().forEach(chart => chart.clear());
  }

  go(stops, at) {
    this.at = at;
    if (this.cloud) this.mark([stops[at]], "");
    else this.together().forEach(chart => chart.see(stops[at]));
  }

  listen() {
    this.plot.addEventListener("pointermove", event => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.leave());
    this.plot.addEventListener("blur", () => this.leave());
    this.plot.addEventListener("keydown", event => this.press(event));
  }

  point(event) {
    const box = this.plot.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width,
      y = 1 - (event.clientY - box.top) / box.height;
    const distance = stop =>
      this.cloud
        ? Math.hypot(this.across(stop.series.x[stop.k]) - x, this.up(stop.series.y[stop.k]) - y)
        : Math.abs(this.across(stop) - x);
    const stops = this.stops();
    const best = stops.reduce((best, stop, i) => (distance(stop) < distance(stops[best]) ? i : best), 0);
    if (stops.length) this.go(stops, best);
  }

  press(event) {
    const stops = this.stops(),
      last = stops.length - 1;
    const to = { ArrowLeft: this.at - 1, ArrowRight: this.at + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.leave();
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.go(stops, Math.max(0, Math.min(last, to)));
  }

  addSwitches() {
    const buttons = all(".legend button", this.figure);
    const isOn = button => button.getAttribute("aria-pressed") === "true";
    const set = (button, on) => {
      button.setAttribute("aria-pressed", on);
      this.groups[button.dataset.series].style.display = on ? "" : "none";
    };
    for (const button of buttons) {
      button.addEventListener("click", () => {
        this.clear();
        set(button, !isOn(button));
      });
      button.addEventListener("dblclick", () => {
        const alone = buttons.every(other => other === button || !isOn(other));
        buttons.forEach(other => set(other, alone || other === button));
      });
    }
  }
}

all("figure.chart .plot").forEach(plot => new Chart(plot.closest("figure")));
