// The clips of the videos that a form names, as frames: what `check` announces, seen before anything is encoded.

import { Refused, el, fill, get, post } from "/static/widgets.js";

const QUIET_MS = 1200;
const FILMS = 6;
const CLIPS = 4;

export class ClipCard {
  constructor(form) {
    const { words } = form;
    Object.assign(this, { form, words, text: null, timer: null, asked: 0, found: null });
    this.say = el("div", { class: "wt-messages", role: "status", "aria-live": "polite" });
    this.list = el("div", { class: "wt-films" });
    this.more = el("button", { type: "button", hidden: true, onclick: () => this.tried(() => this.next(this.asked)) }, words.clips_more);
    this.box = el("details", { class: "wt-section wt-clips" }, el("summary", {}, words.clips), el("p", { class: "wt-note" }, words.clips_help), this.say, this.list, this.more);
    this.box.addEventListener("toggle", () => this.box.open && this.look());
  }

  /** The form has changed: clips that are looked at are looked up again when the typing rests. */
  follow(state) {
    if (!this.box.open || this.text === state.text) return;
    clearTimeout(this.timer);
    this.list.classList.add("wt-stale");
    this.timer = setTimeout(() => this.look(), QUIET_MS);
  }

  async look() {
    const { form, words } = this;
    clearTimeout(this.timer);
    if (!form.state || this.text === form.state.text) return;
    const { text } = form.state;
    this.text = text;
    this.asked += 1;
    const asked = this.asked;
    const chosen = "data.videos" in form.state.values || form.state.rows["data.sets"] > 0;
    if (form.state.broken || Object.keys(form.state.errors).length || !chosen) {
      this.list.replaceChildren();
      this.more.hidden = true;
      this.say.replaceChildren(el("p", { class: "wt-note" }, words.clips_first));
      return;
    }
    this.say.replaceChildren(el("p", { class: "wt-note" }, words.clips_looking));
    await this.tried(async () => {
      const found = await post("/api/data/look", { tab: form.tab, text, language: form.language });
      if (asked !== this.asked) return; // something else was asked for meanwhile
      this.found = found;
      this.shown = 0;
      this.list.replaceChildren();
      this.list.classList.remove("wt-stale");
      this.say.replaceChildren(el("p", {}, fill(words.clips_summary, found)));
      for (const [level, name, what, mend] of found.others) this.say.append(this.line(level, `${name}: ${what}`, mend));
      await this.next(asked);
    });
  }

  /** What the server refuses is shown in place of the clips. */
  async tried(doing) {
    try {
      await doing();
    } catch (error) {
      this.text = null;
      this.list.replaceChildren();
      this.more.hidden = true;
      this.say.replaceChildren(el("p", { class: "wt-error" }, error instanceof Refused ? error.message : this.words.lost));
    }
  }

  async next(asked) {
    const query = new URLSearchParams({ look: this.found.look, start: this.shown, count: FILMS, language: this.form.language });
    const { rows, total } = await get(`/api/data/items?${query}`);
    if (asked !== this.asked) return;
    this.list.append(...rows.map((row) => this.film(row)));
    this.shown += rows.length;
    this.more.hidden = this.shown >= total || !rows.length;
  }

  film(row) {
    const { words } = this;
    const box = el("article", { class: "wt-film" }, el("strong", {}, row.name), el("p", { class: "wt-note" }, row.film || words.clips_none));
    if (row.size) box.append(el("p", { class: "wt-note" }, fill(words.clips_size, { size: row.size.join("×"), percent: row.cropped })));
    for (const [, level, what, mend] of row.findings) box.append(this.line(level, what, mend));
    row.clips.slice(0, CLIPS).forEach((frames, number) => {
      const told = fill(words.clips_one, { number: number + 1, frames });
      const query = new URLSearchParams({ look: this.found.look, n: row.n, k: number, side: 1024 });
      const sheet = el("img", { loading: "lazy", decoding: "async", alt: `${row.name}, ${told}`, src: `/api/data/thumb?${query}` });
      sheet.addEventListener("error", () => sheet.remove(), { once: true });
      box.append(el("figure", {}, sheet, el("figcaption", {}, told)));
    });
    if (row.clips.length > CLIPS) box.append(el("p", { class: "wt-note" }, fill(words.clips_rest, { count: row.clips.length - CLIPS })));
    return box;
  }

  line(level, what, mend) {
    const kind = { error: "wt-error", warning: "wt-warning" }[level] ?? "wt-note";
    return el("p", { class: kind }, what, mend ? el("span", {}, ` → ${mend}`) : "");
  }
}
