// The plan card: what fits the card, as choices; it follows the form.

import { Refused, el, post } from "/static/widgets.js";

const QUIET_MS = 1200;

const wrong = (state) => state.broken || Object.keys(state.errors).length > 0;

export class PlanCard {
  constructor(form) {
    Object.assign(this, { form, text: null, timer: null, running: false, stale: false });
    const { words } = form;
    this.vram = null;
    this.list = el("div", { class: "wt-plans", "aria-live": "polite" });
    this.say = el("p", { class: "wt-note" });
    this.sizes = el("div", { class: "wt-sizes" });
    this.box = el("details", { class: "wt-section wt-plan" }, el("summary", {}, words.plan), this.sizes, this.say, this.list);
    this.box.addEventListener("toggle", () => this.box.open && this.plan());
    this.drawSizes([8, 10, 12, 16, 24, 32]);
  }

  drawSizes(sizes) {
    const { words } = this.form;
    const button = (label, vram) =>
      el("button", { type: "button", "aria-pressed": this.vram === vram, onclick: () => ((this.vram = vram), this.drawSizes(sizes), this.plan(true)) }, label);
    this.sizes.replaceChildren(button(words.plan_this, null), ...sizes.map((gb) => button(`${gb} GB`, gb)));
  }

  /** The form has changed: a plan that is looked at is made again when the typing rests. */
  follow(state) {
    const same = this.text === state.text;
    if (!this.box.open || same) return;
    clearTimeout(this.timer);
    if (wrong(state)) {
      this.say.textContent = this.form.words.plan_first;
      this.list.classList.add("wt-stale");
      return;
    }
    this.timer = setTimeout(() => this.plan(), QUIET_MS);
  }

  async plan(again = false) {
    const { form } = this;
    const { words } = form;
    clearTimeout(this.timer);
    if (!form.state || wrong(form.state)) {
      this.say.textContent = words.plan_first;
      return;
    }
    if (this.running) {
      this.stale = true;
      return;
    }
    if (!again && this.text === form.state.text) return;
    this.running = true;
    this.say.textContent = words.plan_busy;
    this.list.classList.add("wt-stale");
    const { text } = form.state;
    const { vram } = this;
    try {
      this.show(await post(`/api/form/${form.tab}/plan`, { text, vram, language: form.language }), vram);
    } catch (error) {
      this.list.replaceChildren();
      this.say.replaceChildren(el("span", { class: "wt-warning" }, error instanceof Refused ? error.message : words.lost));
    }
    this.running = false;
    this.text = text;
    if (this.stale) {
      this.stale = false;
      if (form.state.text !== text || this.vram !== vram) this.plan(true); // asked for something else meanwhile
    }
  }

  show(answer, vram) {
    const { words } = this.form;
    this.say.textContent = answer.released ? `${words.plan_released}: ${answer.what}` : "";
    this.list.classList.remove("wt-stale");
    this.list.replaceChildren();
    if (vram === null && !answer.found) this.say.append(this.say.textContent ? "\n" : "", words.plan_ask);
    for (const card of answer.cards) {
      const several = answer.cards.length > 1;
      const head = el("h4", {}, `${card.vram} GB · ${card.name} `, card.measured ? el("small", {}, card.measured) : "");
      const box = el("div", { class: "wt-card" }, head);
      if (card.refused) box.append(el("p", { class: "wt-warning" }, card.refused));
      for (const choice of several ? card.choices.slice(0, 1) : card.choices) box.append(this.choice(choice, card));
      for (const one of card.encoders ?? []) box.append(el("p", { class: "wt-note" }, one));
      if (!card.refused && !several) box.append(el("p", { class: "wt-note" }, card.why, el("br"), card.more));
      this.list.append(box);
    }
  }

  choice(choice, card) {
    const { words } = this.form;
    const bar = el("div", { class: "wt-memory", role: "img", "aria-label": choice.parts.map(([name, gb]) => `${name} ${gb} GB`).join(", ") });
    choice.parts.forEach(([name, gb], index) => {
      bar.append(el("i", { style: `width:${(100 * gb) / card.vram}%`, class: `wt-part-${index % 6}`, title: `${name}: ${gb} GB` }));
    });
    const use = async () => {
      Object.assign(this.form.pending, choice.changes);
      await this.form.send();
      this.say.textContent = words.plan_used;
    };
    return el(
      "div",
      { class: "wt-choice" },
      el("strong", {}, choice.title),
      el("span", {}, choice.words.join(" · ")),
      el("span", { class: "wt-figures" }, choice.figures.join(" · ")),
      bar,
      el("button", { type: "button", onclick: use }, words.plan_use),
    );
  }
}
