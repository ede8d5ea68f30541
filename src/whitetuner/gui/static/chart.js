// <wt-chart>: the loss of a run on a canvas: each step's range, the running mean, validation, learning rate, checkpoints.
// The server thins to about 1,200 stretches, so a frame costs the same at 200 steps and at 200,000.

import { loadedWords, wordOf } from "./view.js";

const PAD = { left: 56, right: 52, top: 10, bottom: 26 };
const HEIGHT = 260;
const cut = (values, share) => {
  const sorted = values.filter((one) => one !== null).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(share * (sorted.length - 1))))] : 0;
};

/** Round numbers inside [low, high]. */
function ticks(low, high, about) {
  const raw = (high - low) / about;
  if (!(raw > 0)) return [low];
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((one) => one * base).find((one) => one >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return found;
}

const label = (value) => (value !== 0 && (Math.abs(value) < 0.001 || Math.abs(value) >= 100000) ? value.toExponential(0) : `${Number(value.toPrecision(3))}`);

class Chart extends HTMLElement {
  async connectedCallback() {
    if (this.canvas) return;
    await loadedWords;
    this.w = (name, values) => wordOf(name, this.dataset.lang, values);
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.tip = document.createElement("div");
    this.tip.className = "wr-tip";
    this.tip.hidden = true;
    this.legend = document.createElement("div");
    this.legend.className = "wr-legend";
    this.log = this.toggle("log_scale");
    this.lr = this.toggle("show_lr");
    this.hint = document.createElement("small");
    this.hint.textContent = this.w("chart_hint");
    this.replaceChildren(this.canvas, this.tip, this.legend);
    for (const name of ["raw", "smooth", "validation"]) this.legend.append(this.key(name));
    this.origin = this.key("origin");
    this.origin.hidden = true;
    this.legend.append(this.origin);
    this.legend.append(this.log.parentElement, this.lr.parentElement, this.hint);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => { this.tip.hidden = true; });
    new ResizeObserver(() => this.draw()).observe(this);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.draw();
  }

  key(name) {
    const made = document.createElement("span");
    const dot = document.createElement("i");
    dot.className = `wr-key wr-key-${name}`;
    made.append(dot, this.w(name));
    return made;
  }

  toggle(name) {
    const box = document.createElement("input");
    box.type = "checkbox";
    box.addEventListener("change", () => this.draw());
    const around = document.createElement("label");
    around.append(box, ` ${this.w(name)}`);
    return box;
  }

  show(data) {
    this.data = data;
    this.origin.hidden = !data.origin;
    if (data.origin) this.origin.lastChild.textContent = this.w("origin", { name: data.origin.name, step: data.origin.at });
    this.draw();
  }

  scale(width) {
    const { step, low, high, validation, origin } = this.data;
    const smooth = [...this.data.smooth, ...(origin?.smooth ?? [])].filter((one) => one !== null);
    const measured = validation.map(([, loss]) => loss).filter((one) => one !== null);
    let bottom = Math.min(cut(low, 0.005), ...measured, ...smooth);
    let top = Math.max(cut(high, 0.995), ...measured, ...smooth);
    const log = this.log.checked && bottom > 0;
    if (!log && bottom > 0 && bottom < top / 2) bottom = 0;
    if (top <= bottom) top = bottom + (Math.abs(bottom) || 1) * 0.1;
    const first = Math.min(step[0], ...validation.map(([at]) => at), ...(origin?.step.slice(0, 1) ?? []));
    const last = Math.max(step.at(-1), first + 1, ...(origin?.step.slice(-1) ?? []));
    const f = log ? Math.log : (value) => value;
    const [a, b] = [f(bottom), f(top)];
    return {
      bottom, top, log, first, last,
      x: (at) => PAD.left + ((width - PAD.left - PAD.right) * (at - first)) / (last - first),
      y: (value) => HEIGHT - PAD.bottom - (HEIGHT - PAD.top - PAD.bottom) * Math.min(1, Math.max(0, (f(Math.max(value, log ? bottom : value)) - a) / (b - a))),
    };
  }

  draw() {
    if (!this.canvas || !this.clientWidth) return;
    const began = performance.now();
    const width = this.clientWidth;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = HEIGHT * ratio;
    this.canvas.style.height = `${HEIGHT}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(this);
    const color = (name) => style.getPropertyValue(`--wt-${name}`).trim();
    pen.font = "12px system-ui, sans-serif";
    if (!this.data?.step.length) {
      pen.fillStyle = color("soft");
      pen.textAlign = "center";
      pen.fillText(this.w("no_curve"), width / 2, HEIGHT / 2);
      this.canvas.setAttribute("aria-label", this.w("no_curve"));
      return;
    }
    const { step, low, high, smooth, lr, validation, saved } = this.data;
    const at = (this.at = this.scale(width));
    this.axes(pen, at, width, color);
    const trace = (values, from = 0) => values.forEach((value, i) => {
      if (value !== null) (i === from ? pen.moveTo(at.x(step[i]), at.y(value)) : pen.lineTo(at.x(step[i]), at.y(value)));
    });
    pen.fillStyle = pen.strokeStyle = color("raw");
    pen.beginPath();
    trace(high);
    for (let i = step.length - 1; i >= 0; i--) pen.lineTo(at.x(step[i]), at.y(low[i]));
    pen.closePath();
    pen.lineWidth = 1;
    pen.fill();
    pen.stroke();
    if (this.lr.checked) this.rate(pen, at, lr, color);
    const { origin } = this.data;
    if (origin) {
      pen.strokeStyle = color("soft");
      pen.lineWidth = 1.5;
      pen.setLineDash([5, 4]);
      pen.beginPath();
      origin.smooth.forEach((value, i) => { if (value !== null) pen.lineTo(at.x(origin.step[i]), at.y(value)); });
      pen.stroke();
      pen.setLineDash([]);
    }
    pen.strokeStyle = color("smooth");
    pen.lineWidth = 2;
    pen.beginPath();
    trace(smooth);
    pen.stroke();
    pen.strokeStyle = pen.fillStyle = color("validation");
    pen.lineWidth = 1.5;
    pen.beginPath();
    const seen = validation.filter(([, loss]) => loss !== null);
    seen.forEach(([on, loss], i) => (i ? pen.lineTo(at.x(on), at.y(loss)) : pen.moveTo(at.x(on), at.y(loss))));
    pen.stroke();
    for (const [on, loss] of seen) { pen.beginPath(); pen.arc(at.x(on), at.y(loss), 3.5, 0, 7); pen.fill(); }
    pen.fillStyle = color("soft");
    for (const on of saved.slice(-60)) {
      const x = at.x(on);
      pen.beginPath();
      pen.moveTo(x, HEIGHT - PAD.bottom);
      pen.lineTo(x - 4, HEIGHT - PAD.bottom + 7);
      pen.lineTo(x + 4, HEIGHT - PAD.bottom + 7);
      pen.fill();
    }
    const last = (values) => values.findLast((one) => one !== null);
    this.canvas.setAttribute("aria-label", `${this.w("chart")}: ${this.w("step")} ${step.at(-1)}, ${this.w("smooth")} ${last(smooth)?.toFixed(4)}`);
    this.dataset.points = step.length;
    this.dataset.last = step.at(-1);
    this.dataset.origin = origin?.step.length ?? 0;
    this.dataset.ms = Math.round(performance.now() - began);
  }

  axes(pen, at, width, color) {
    pen.strokeStyle = color("line");
    pen.fillStyle = color("soft");
    pen.lineWidth = 1;
    pen.textAlign = "right";
    for (const value of at.log ? [at.bottom, Math.sqrt(at.bottom * at.top), at.top] : ticks(at.bottom, at.top, 5)) {
      const y = at.y(value);
      pen.beginPath();
      pen.moveTo(PAD.left, y);
      pen.lineTo(width - PAD.right, y);
      pen.stroke();
      pen.fillText(label(value), PAD.left - 6, y + 4);
    }
    pen.textAlign = "center";
    for (const value of ticks(at.first, at.last, Math.max(2, Math.floor(width / 110)))) {
      if (Number.isInteger(value)) pen.fillText(String(value), at.x(value), HEIGHT - 6);
    }
  }

  rate(pen, at, lr, color) {
    const top = Math.max(...lr) || 1;
    const y = (value) => HEIGHT - PAD.bottom - (HEIGHT - PAD.top - PAD.bottom) * (value / top) * 0.98;
    pen.strokeStyle = pen.fillStyle = color("rate");
    pen.lineWidth = 1.5;
    pen.beginPath();
    lr.forEach((value, i) => (i ? pen.lineTo(at.x(this.data.step[i]), y(value)) : pen.moveTo(at.x(this.data.step[i]), y(value))));
    pen.stroke();
    pen.textAlign = "left";
    pen.fillText(top.toExponential(1), this.clientWidth - PAD.right + 4, y(top) + 4);
  }

  hover(event) {
    if (!this.data?.step.length || !this.at) return;
    const { step, low, high, smooth, lr, validation } = this.data;
    const x = event.offsetX;
    let near = 0;
    step.forEach((one, i) => { if (Math.abs(this.at.x(one) - x) < Math.abs(this.at.x(step[near]) - x)) near = i; });
    const range = low[near] === high[near] ? `${low[near]}` : `${low[near]} … ${high[near]}`;
    const measured = validation.find(([on]) => on === step[near])?.[1];
    this.tip.textContent = `${this.w("step")} ${step[near]}\n${this.w("loss")} ${range}\n${this.w("smooth")} ${smooth[near]}\n${this.w("lr")} ${lr[near]}`
      + (measured === undefined ? "" : `\n${this.w("validation")} ${measured}`);
    this.tip.hidden = false;
    this.tip.style.left = `${Math.min(this.at.x(step[near]) + 12, this.clientWidth - 170)}px`;
  }
}

customElements.define("wt-chart", Chart);
