// The data page: a grid of any length, of which only what is near is held; findings, sizes, captions to change.

import { Refused, answered, choosePath, dialog, el, fill, get, post, style, toast } from "/static/widgets.js";

const CHUNK = 48;
let page = null;

export async function mount(place, language) {
  style();
  page = new DataPage(place, language, await get(`/api/data/words?language=${language}`));
  page.draw();
  page.fromForm();
}

window.addEventListener("wt-data", () => page?.fromForm());

class DataPage {
  constructor(place, language, words) {
    Object.assign(this, { place, language, words, look: null, kind: "", asked: null });
  }

  draw() {
    const { words } = this;
    this.folder = el("input", { type: "text", id: "data-folder", spellcheck: "false", autocomplete: "off" });
    this.conditions = el("textarea", { id: "data-conditions", rows: "2", spellcheck: "false" });
    this.resolution = el("input", { type: "text", id: "data-resolution", inputmode: "numeric", placeholder: "1024" });
    this.deep = el("input", { type: "checkbox", id: "data-deep" });
    const browse = async () => {
      const path = await choosePath("folder", this.folder.value.trim(), words, this.language, false);
      if (path) ((this.folder.value = path), this.ask());
    };
    this.folder.addEventListener("keydown", (event) => event.key === "Enter" && this.ask());
    this.button = el("button", { type: "button", class: "wt-main", onclick: () => this.ask() }, words.look);
    this.origin = el("p", { class: "wt-note", hidden: true });
    this.summary = el("div", { class: "wt-summary", role: "status", "aria-live": "polite" });
    this.chips = el("div", { class: "wt-chips", role: "group", "aria-label": words.findings });
    this.buckets = el("div", { class: "wt-buckets" });
    this.drop = el("button", { type: "button", class: "wt-drop", hidden: true }, words.upload);
    this.grid = el("div", { class: "wt-grid" });
    this.writer = this.drawWriter();
    this.place.replaceChildren(
      el(
        "div",
        { class: "wt-lookbar" },
        el("label", { for: "data-folder" }, words.folder, this.folder),
        el("button", { type: "button", onclick: browse }, words.browse),
        el("label", { for: "data-resolution", class: "wt-short" }, words.resolution, this.resolution),
        this.button,
      ),
      el("details", {}, el("summary", {}, words.conditions), this.conditions, el("label", { for: "data-deep", class: "wt-deep" }, this.deep, ` ${words.deep}`)),
      this.origin,
      this.summary,
      this.chips,
      this.buckets,
      this.writer,
      this.drop,
      this.grid,
    );
    this.watchDrops();
  }

  /** What a form asked to see ("look at the data"). */
  fromForm() {
    const asked = sessionStorage.getItem("wt-data");
    if (!asked) return;
    sessionStorage.removeItem("wt-data");
    const { tab, text } = JSON.parse(asked);
    this.ask({ tab, text });
  }

  async ask(form = null) {
    const { words } = this;
    const body = form ?? { folder: this.folder.value, conditions: this.conditions.value, resolution: this.resolution.value };
    this.asked = form;
    Object.assign(this.button, { disabled: true });
    this.summary.replaceChildren(el("p", { class: "wt-note" }, words.looking));
    try {
      this.show(await post("/api/data/look", { ...body, deep: this.deep.checked, language: this.language }));
    } catch (error) {
      this.summary.replaceChildren(...(error.errors ?? [["", words.lost, ""]]).map(([where, what, mend]) => el("p", { class: "wt-error" }, `${where ? `${where}: ` : ""}${what}${mend ? ` → ${mend}` : ""}`)));
      for (const one of [this.chips, this.buckets, this.grid]) one.replaceChildren();
      this.drop.hidden = this.writer.hidden = true;
    }
    this.button.disabled = false;
  }

  show(found) {
    const { words } = this;
    this.look = found;
    this.kind = "";
    if (this.asked) this.folder.value = found.folders[0] ?? "";
    if (this.asked) this.resolution.value = found.resolution;
    if (this.asked) this.conditions.value = found.folders.slice(1).join("\n");
    this.origin.hidden = !this.asked;
    this.origin.textContent = this.asked ? `${words.from_tab} ${this.asked.tab}` : "";
    this.summary.replaceChildren(el("p", {}, fill(words.summary, found)), found.steps ? el("p", { class: "wt-note" }, fill(words.steps, found)) : "");
    for (const [level, name, what, mend] of found.others) {
      this.summary.append(el("p", { class: level === "error" ? "wt-error" : level === "warning" ? "wt-warning" : "wt-note" }, `${name}: ${what}${mend ? ` → ${mend}` : ""}`));
    }
    this.summary.append(el("p", { class: "wt-note" }, words.untouched));
    this.drawChips();
    const most = Math.max(1, ...found.buckets.map(([, count]) => count));
    this.buckets.replaceChildren();
    if (found.buckets.length) this.buckets.append(el("h4", {}, words.buckets));
    for (const [size, count] of found.buckets) {
      this.buckets.append(el("div", { class: "wt-bucket" }, el("span", {}, size), el("i", { style: `width:${(100 * count) / most}%` }), el("span", {}, count)));
    }
    this.drop.hidden = this.writer.hidden = !found.folders.length;
    this.drawGrid(found.pictures);
  }

  drawChips() {
    const { words, look } = this;
    const chip = (kind, label, count, level) =>
      el(
        "button",
        { type: "button", class: `wt-chip wt-${level}chip`, "aria-pressed": this.kind === kind, onclick: () => ((this.kind = kind), this.drawChips(), this.drawGrid(count)) },
        `${label} ${count}`,
      );
    this.chips.replaceChildren(chip("", words.all, look.pictures, "all"), ...look.kinds.map(([kind, count, level]) => chip(kind, words[`kind:${kind}`] ?? kind, count, level)));
  }

  // -- the grid ---------------------------------------------------------------------------------------------------

  drawGrid(total) {
    const { words } = this;
    this.observer?.disconnect();
    this.grid.replaceChildren();
    if (!total) {
      this.grid.append(el("p", { class: "wt-note" }, this.kind ? words.fine : words.none));
      return;
    }
    const columns = Math.max(1, Math.floor(this.grid.clientWidth / 252));
    this.observer = new IntersectionObserver((seen) => seen.forEach((one) => (one.isIntersecting ? this.fillChunk(one.target) : this.emptyChunk(one.target))), { rootMargin: "1200px" });
    for (let start = 0; start < total; start += CHUNK) {
      const rows = Math.ceil(Math.min(CHUNK, total - start) / columns);
      const chunk = el("div", { class: "wt-chunk", style: `min-height:${rows * 384}px` });
      Object.assign(chunk, { start, of: this.look.look, kind: this.kind });
      this.grid.append(chunk);
      this.observer.observe(chunk);
    }
  }

  async fillChunk(chunk) {
    if (chunk.filling || chunk.childElementCount) return;
    chunk.filling = true;
    try {
      const query = new URLSearchParams({ look: chunk.of, kind: chunk.kind, start: chunk.start, count: CHUNK, language: this.language });
      const found = await get(`/api/data/items?${query}`);
      chunk.replaceChildren(...found.rows.map((row) => this.card(row)));
    } catch (error) {
      toast(error instanceof Refused ? error.message : this.words.lost, null, "bad");
    }
    chunk.filling = false;
  }

  emptyChunk(chunk) {
    if (!chunk.childElementCount || chunk.contains(document.activeElement)) return;
    chunk.style.minHeight = `${chunk.offsetHeight}px`; // what was there keeps its room
    chunk.replaceChildren();
  }

  card(row) {
    const box = el("article", { class: "wt-item", "data-n": row.n });
    this.fillCard(box, row);
    return box;
  }

  fillCard(box, row) {
    const { words } = this;
    const picture = (which, name) => {
      const image = el("img", { loading: "lazy", decoding: "async", alt: name, title: name, src: this.thumb(row.n, which, 256) });
      image.addEventListener("error", () => image.replaceWith(el("span", { class: "wt-broken", title: name }, "✕")), { once: true });
      const label = row.conditions.length ? (which ? fill(words.condition, { number: which }) : words.target) : "";
      return el("figure", {}, el("button", { type: "button", "aria-label": name, onclick: () => this.enlarge(row) }, image), label ? el("figcaption", {}, label) : "");
    };
    const facts = [row.film, row.source ? row.source.join("×") : "", row.size ? fill(words.trained_at, { size: row.size.join("×") }) : "", row.cropped ? fill(words.cut, { percent: row.cropped }) : ""];
    const badges = el("div", { class: "wt-badges" });
    for (const [kind, level, what, mend] of row.findings) badges.append(el("span", { class: `wt-badge wt-${level}chip`, title: `${what}${mend ? ` → ${mend}` : ""}` }, words[`kind:${kind}`] ?? kind));
    const text = el("textarea", { rows: "3", "aria-label": `${words.caption}: ${row.name}`, placeholder: words.no_caption, disabled: row.fixed });
    text.value = row.caption ?? "";
    const say = el("small", { class: "wt-note", "aria-live": "polite" });
    const undo = el("button", { type: "button", hidden: !row.undo, onclick: () => this.write(box, "undo", { n: row.n }, words.undone) }, words.undo);
    text.addEventListener("change", () => this.write(box, "caption", { n: row.n, text: text.value, before: row.caption }, words.kept));
    box.replaceChildren(
      el("div", { class: `wt-pictures wt-of-${Math.min(3, 1 + row.conditions.length)}` }, picture(0, row.name), ...row.conditions.map((name, index) => picture(index + 1, name))),
      el("div", { class: "wt-name", title: row.name }, row.name),
      el("small", { class: "wt-note" }, facts.filter(Boolean).join(" · ")),
      badges,
      text,
      el("div", { class: "wt-under" }, say, undo),
    );
    box.say = say;
  }

  thumb(n, which, side) {
    return `/api/data/thumb?look=${encodeURIComponent(this.look.look)}&n=${n}&c=${which}&side=${side}`;
  }

  async write(box, word, body, done) {
    try {
      const row = await post(`/api/data/${word}`, { look: this.look.look, language: this.language, ...body });
      this.fillCard(box, row);
      box.say.textContent = done;
    } catch (error) {
      toast(error instanceof Refused ? error.message : this.words.lost, null, "bad");
    }
  }

  enlarge(row) {
    return dialog(row.name, this.words, (box) => {
      const all = [row.name, ...row.conditions].map((name, which) => el("figure", {}, el("img", { src: this.thumb(row.n, which, 1024), alt: name }), el("figcaption", {}, name)));
      box.classList.add("wt-large");
      box.append(el("div", { class: "wt-pictures" }, ...all), el("p", {}, row.text ?? this.words.no_caption));
      for (const [, level, what, mend] of row.findings) box.append(el("p", { class: level === "error" ? "wt-error" : "wt-warning" }, `${what}${mend ? ` → ${mend}` : ""}`));
    });
  }

  // -- captions by a model ----------------------------------------------------------------------------------------

  drawWriter() {
    const { words } = this;
    const model = el("input", { type: "text", id: "data-model", spellcheck: "false", autocomplete: "off" });
    const ask = el("input", { type: "text", id: "data-instruction", placeholder: words.instruction_default });
    const trigger = el("input", { type: "text", id: "data-trigger" });
    const said = el("pre", { class: "wt-said", "aria-live": "polite", hidden: true });
    const stop = el("button", { type: "button", hidden: true, onclick: () => post("/api/data/writing", { stop: true, language: this.language }) }, words.stop);
    const browse = async () => {
      const path = await choosePath("folder", model.value.trim(), words, this.language, false);
      if (path) model.value = path;
    };
    const follow = async () => {
      const found = await post("/api/data/writing", { language: this.language });
      said.textContent = found.lines.join("\n") || words.working;
      stop.hidden = !found.running;
      if (found.running) setTimeout(() => follow().catch(() => setTimeout(follow, 3000)), 800);
      else await this.ask(this.asked);
    };
    const start = async (most) => {
      const body = { look: this.look.look, model: model.value, instruction: ask.value, trigger: trigger.value, most, language: this.language };
      try {
        await post("/api/data/write", body);
        said.hidden = false;
        await follow();
      } catch (error) {
        toast(error instanceof Refused ? error.message : words.lost, null, "bad");
      }
    };
    return el(
      "details",
      { class: "wt-writer", hidden: true },
      el("summary", {}, words.write),
      el("p", { class: "wt-note" }, words.write_help),
      el("div", { class: "wt-lookbar" }, el("label", { for: "data-model" }, words.write_model, model), el("button", { type: "button", onclick: browse }, words.browse)),
      el("div", { class: "wt-lookbar" }, el("label", { for: "data-instruction" }, words.instruction, ask), el("label", { for: "data-trigger", class: "wt-short" }, words.trigger, trigger)),
      el("div", { class: "wt-buttons" }, el("button", { type: "button", onclick: () => start(3) }, words.write_three), el("button", { type: "button", onclick: () => start(null) }, words.write_all), stop),
      said,
    );
  }

  // -- files that are added ---------------------------------------------------------------------------------------

  watchDrops() {
    const input = el("input", { type: "file", multiple: true, class: "wt-hidden", tabindex: "-1", "aria-hidden": "true", accept: "image/*,video/*,.txt,.caption" });
    input.addEventListener("change", () => (this.upload([...input.files]), (input.value = "")));
    this.drop.after(input);
    this.drop.addEventListener("click", () => input.click());
    for (const name of ["dragover", "dragenter"]) this.drop.addEventListener(name, (event) => (event.preventDefault(), this.drop.classList.add("wt-over")));
    this.drop.addEventListener("dragleave", () => this.drop.classList.remove("wt-over"));
    this.drop.addEventListener("drop", (event) => {
      event.preventDefault();
      this.drop.classList.remove("wt-over");
      this.upload([...event.dataTransfer.files]);
    });
  }

  async upload(files) {
    const { words } = this;
    const refused = [];
    let count = 0;
    for (const file of files) {
      this.drop.textContent = `${words.working} ${count + 1}/${files.length}`;
      const query = new URLSearchParams({ look: this.look.look, name: file.name, into: 0, language: this.language });
      try {
        const answer = await fetch(`/api/data/upload?${query}`, { method: "POST", headers: { "content-type": "application/octet-stream" }, body: file });
        await answered(answer);
        count += 1;
      } catch (error) {
        refused.push(`${file.name}: ${error instanceof Refused ? error.message : words.lost}`);
      }
    }
    this.drop.textContent = words.upload;
    if (count) toast(fill(words.uploaded, { count }));
    if (refused.length) toast(fill(words.not_added, { names: `\n${refused.slice(0, 5).join("\n")}` }), null, "bad");
    if (count) await this.ask(this.asked);
  }
}
