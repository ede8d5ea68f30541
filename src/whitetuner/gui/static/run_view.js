// <wt-run>: one run, as its folder tells it. <wt-result>: what it has brought.
import "./chart.js";
import { View, bytes, gb, h, remember, words } from "./view.js";

/** <wt-run data-run="ID">: everything of one run. data-small: the right column of a training tab. */
class RunView extends View {
  curve = null;

  draw() {
    const small = this.dataset.small !== undefined;
    const box = (name, title) => h("section", {}, title ? h("h3", {}, title) : null, h("div", { "data-part": name }));
    this.replaceChildren(
      h("div", { "data-part": "head", class: "wr-head" }),
      h("div", { "data-part": "why" }),
      h("div", { "data-part": "buttons", class: "wr-buttons" }),
      h("div", { "data-part": "alert", class: "wr-alert", role: "alert" }),
      h("div", { "data-part": "progress" }),
      h("div", { "data-part": "tiles", class: "wr-tiles" }),
      h("section", {}, h("h3", {}, this.w("chart")), (this.chart = h("wt-chart", { "data-lang": this.lang }))),
      box("previews", small ? null : this.w("previews")),
      h("section", {}, h("h3", {}, this.w("log")), (this.log = h("pre", { class: "wr-log", tabindex: "0" }, this.w("no_log")))),
    );
  }

  known(names) {
    return this.w(names.program ? "names_known" : "names_own", names);
  }

  async look() {
    const id = this.dataset.run;
    if (!id || this.leaving) return;
    const run = await this.ask(`/api/runs/${id}`);
    if (id !== this.dataset.run) return;
    this.run = run;
    this.show(run);
    if (!this.curve || this.curve.version !== run.version || this.curve.of !== id) {
      const found = await this.ask(`/api/runs/${id}/curve?version=${this.curve?.of === id ? this.curve.version : -1}`);
      if (found.step) { this.curve = { ...found, of: id }; this.chart.show(this.curve); }
    }
    const { lines } = await this.ask(`/api/runs/${id}/log`);
    const text = lines.join("\n") || this.w("no_log");
    if (text !== this.log.textContent) {
      const follow = this.log.scrollTop + this.log.clientHeight >= this.log.scrollHeight - 30;
      this.log.textContent = text;
      if (follow) this.log.scrollTop = this.log.scrollHeight;
    }
    if (this.waits && run.state !== "running") { this.waits = false; this.say(""); }
    this.dataset.state = run.state;
    this.dispatchEvent(new CustomEvent("run", { detail: run, bubbles: true }));
  }

  show(run) {
    const n = run.numbers;
    const small = this.dataset.small !== undefined; // there, Stop stands beside Start
    this.part("head", [run.name, run.state, run.place], () => [h("h2", {}, run.name), this.badge(run), h("small", {}, run.run)]);
    this.part("why", [run.reason, run.state], () => this.why(run));
    this.part("buttons", run.can, () => run.can.filter((wish) => wish !== "stop" || !small).map((wish) => this.button(wish)));
    this.part("progress", [run.phase, run.done, run.total, n.step, run.steps, run.state], () => this.progress(run));
    const card = run.machine.devices.find((one) => one.total_mb);
    const tiles = [
      ["loss", n.loss?.toFixed(4), n.loss_mean !== undefined ? `${this.w("loss_mean")} ${n.loss_mean?.toFixed(4)}` : ""],
      ["lr", n.lr?.toExponential(2)], ["step", n.step !== undefined ? `${n.step}/${run.steps ?? "?"}` : undefined],
      ["eta", run.state === "running" ? n.eta : undefined], ["seconds", n.seconds], ["samples_per_s", n.samples_per_s, n.samples ? this.w("a_step", { count: n.samples }) : ""],
      ["memory", n.memory_mb ? `${gb(n.memory_mb)} GB` : undefined],
      card ? ["gpu", `${gb(card.used_mb)}/${gb(card.total_mb)} GB`, `${card.busy ?? "?"} %  ${card.celsius ?? "?"} °C  ${card.watts ?? "?"} W`]
        : ["ram", `${run.machine.ram_used_gb}/${run.machine.ram_gb} GB`],
      ...(run.ranks.length > 1 ? [["ranks", run.ranks.length, run.ranks.map((one) =>
        `${one.rank}: ${one.device}, ${one.waiting ? this.w("rank_waiting", one) : this.w("rank_whole")}`).join("\n")]] : []),
    ];
    this.part("tiles", tiles, () => tiles.map(([name, value, more]) =>
      h("div", { class: "wr-tile", "data-tile": name }, h("span", {}, this.w(name)), h("b", {}, String(value ?? "–")), h("small", {}, more ?? ""))));
    this.part("previews", [run.previews, run.origin], () => this.previews(run));
  }

  why(run) {
    if (!run.reason.kind) return [];
    const more = ["crashed", "failed"].includes(run.state);
    return h("div", { class: "wr-why", role: "status" }, h("b", {}, this.w(`why_${run.reason.kind}`, run.reason)),
      run.reason.text ? h("pre", {}, run.reason.text) : null, more ? h("p", {}, this.w("why_more")) : null);
  }

  button(wish) {
    const id = this.dataset.run;
    if (wish === "more") {
      const count = h("input", { type: "number", min: 1, step: 1, value: 500, "aria-label": this.w("more_steps") });
      const add = () => this.tried(() => this.ask(`/api/runs/${id}/resume`, { more: Number.parseInt(count.value, 10) || 0 }));
      return h("span", { class: "wr-more" }, h("button", { "data-wish": wish, onclick: add }, this.w("more")), count, this.w("more_steps"));
    }
    const doing = () => this.asked(wish);
    const kind = wish === "stop" || wish === "resume" ? "wr-main" : wish === "now" ? "wr-danger" : "";
    return h("button", { "data-wish": wish, class: kind, onclick: () => this.tried(doing) }, this.w(wish));
  }

  /** Asks for a wish, after making sure where something would be lost. */
  async asked(wish) {
    if (words[`${wish}_sure`] && !confirm(this.w(`${wish}_sure`))) return;
    const to = `/api/runs/${this.dataset.run}/${wish === "resume" ? "resume" : "ask"}`;
    this.leaving = ["cancel", "forget"].includes(wish); // it will be unknown then, and need not be asked for
    try {
      await this.ask(to, wish === "resume" ? {} : { wish });
    } catch (error) {
      this.leaving = false;
      throw error;
    }
    if (this.leaving) remember({ run: "" });
    if (["stop", "save", "preview"].includes(wish)) { this.say(this.w("asked")); this.waits = true; }
  }

  progress(run) {
    if (run.state !== "running" || !run.phase) return [];
    const training = run.phase === "train";
    const [done, total] = training ? [run.numbers.step ?? 0, run.steps] : [run.done, run.total];
    const share = total ? (100 * (done ?? 0)) / total : 0;
    const bar = h("div", { class: "wr-bar", role: "progressbar", "aria-valuenow": Math.round(share), "aria-valuemin": 0, "aria-valuemax": 100 }, h("i"));
    bar.firstChild.style.width = `${share}%`;
    return [h("p", { class: "wr-phase" }, this.phaseWord(run.phase), total ? ` ${done ?? 0}/${total}` : ""), bar];
  }

  previews(run) {
    if (!run.previews.length) return this.dataset.small !== undefined ? [] : h("p", { class: "wr-soft" }, this.w("no_previews"));
    const columns = this.dataset.small !== undefined ? run.previews.slice(-3) : columnsOf(run);
    const prompts = columns.at(-1).prompts;
    const head = h("tr", {}, h("th"), columns.map((one) => h("th", { scope: "col", class: one.of ? "wr-soft" : "" }, this.titleOf(one))));
    const rows = prompts.map((prompt, row) => h("tr", {}, h("th", { scope: "row", title: prompt }, prompt), columns.map((one) => {
      const number = numberIn(one, prompt, row);
      return h("td", {}, number === null ? null : h("button", { class: "wr-thumb", onclick: () => compare(this, run, row, one) },
        this.small(one, number, `${prompt}, ${this.titleOf(one)}`)));
    })));
    const table = h("div", { class: "wr-grid", tabindex: "0" }, h("table", {}, h("thead", {}, head), h("tbody", {}, rows)));
    setTimeout(() => { table.scrollLeft = table.scrollWidth; });
    return table;
  }

  titleOf(one) { return `${one.of ? `${one.of}, ` : ""}${this.w("at_step", { step: one.step })}`; }

  picture(one, number, film) {
    const more = [...(one.of ? ["origin"] : []), ...(film ? ["film"] : [])].join("&");
    return `/api/runs/${this.dataset.run}/preview/${one.step}/${number}${more && `?${more}`}`;
  }

  /** A preview in the table: a picture, or a clip that plays while it is in sight. */
  small(one, number, alt) {
    if (!one.films?.[number]) return h("img", { loading: "lazy", src: this.picture(one, number), alt });
    const clip = film({ preload: "none", "aria-label": alt });
    clip.dataset.src = this.picture(one, number, true);
    inSight.observe(clip);
    return clip;
  }
}

/** A clip that repeats without sound. */
function film(attributes) {
  const clip = h("video", { loop: true, playsinline: true, disablepictureinpicture: true, ...attributes });
  clip.muted = true; // as an attribute it would be read too late for playing by itself
  return clip;
}

/** Clips are fetched and played while they are seen; a page of them would keep every core busy. */
const inSight = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    if (!isIntersecting) target.pause();
    else {
      if (!target.src) target.src = target.dataset.src;
      target.play().catch(() => {}); // a browser may forbid it; the first frame stays
    }
  }
});

/** Previews of the run, and before them those of the run that it was forked from (of: its name). */
function columnsOf(run) {
  return [...(run.origin?.previews ?? []).map((one) => ({ ...one, of: run.origin.name })), ...run.previews];
}

/** Which picture of a column belongs to a row's prompt; a fork may have other prompts than its origin. null: none. */
function numberIn(one, prompt, row) {
  const number = one.of ? one.prompts.indexOf(prompt) : row;
  return number >= 0 && number < one.count ? number : null;
}

/** Two previews of one prompt over each other, divided by a slider. */
function compare(view, run, row, chosen) {
  const prompt = run.previews.at(-1).prompts[row];
  const isFilm = (one) => one.films?.[numberIn(one, prompt, row)] ?? false;
  const alike = isFilm(chosen);
  const there = columnsOf(run).filter((one) => numberIn(one, prompt, row) !== null && isFilm(one) === alike);
  const choose = (index) => h("select", {}, there.map((one, at) => h("option", { value: at, selected: at === index }, view.titleOf(one))));
  const left = choose(0);
  const right = choose(there.findIndex((one) => one.step === chosen.step && one.of === chosen.of));
  const shown = (alt, more) => (alike ? film({ "aria-label": alt, ...more }) : h("img", { alt, ...more }));
  const before = shown(view.w("left"), {});
  const after = shown(view.w("right"), { class: "wr-over" });
  const slider = h("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": view.w("compare") });
  const cut = () => { after.style.clipPath = `inset(0 0 0 ${slider.value}%)`; line.style.left = `${slider.value}%`; };
  const line = h("i", { class: "wr-cut" });
  const place = (at) => view.picture(there[at], numberIn(there[at], prompt, row), alike);
  const pick = () => {
    before.src = place(left.value);
    after.src = place(right.value);
    if (alike) for (const one of [before, after]) one.play().catch(() => {});
  };
  if (alike) after.addEventListener("timeupdate", () => { // the two show the same moment
    if (Math.abs(after.currentTime - before.currentTime) > 0.1) after.currentTime = before.currentTime;
  });
  for (const one of [left, right]) one.addEventListener("change", pick);
  slider.addEventListener("input", cut);
  const dialog = h("dialog", { class: "wr-compare" }, h("p", {}, prompt),
    h("div", { class: "wr-pair" }, before, after, line), slider,
    h("div", { class: "wr-buttons" }, h("label", {}, `${view.w("left")} `, left), h("label", {}, `${view.w("right")} `, right),
      h("button", { onclick: () => dialog.close() }, view.w("close"))));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  pick();
  cut();
  dialog.showModal();
}

/** <wt-result>: what a run has brought: before and after, checkpoints, files, ComfyUI, report. */
class ResultView extends RunView {
  draw() {
    const box = (name, title) => h("section", {}, h("h3", {}, title), h("div", { "data-part": name }));
    this.folder = h("input", { type: "text", placeholder: this.w("comfyui_folder"), "aria-label": this.w("comfyui_folder") });
    const copy = async () => { this.say(this.w("copied", await this.ask(`/api/runs/${this.dataset.run}/comfyui`, { folder: this.folder.value }))); };
    this.replaceChildren(h("div", { "data-part": "head", class: "wr-head" }), box("pair", this.w("before_after")), box("files", this.w("files")),
      h("div", { class: "wr-buttons" }, this.folder, this.copy = h("button", { class: "wr-main", "data-wish": "comfyui", onclick: () => this.tried(copy) }, this.w("comfyui")),
        this.without = h("span", { class: "wr-soft", hidden: true }, this.w("comfyui_not")),
        h("a", { href: `/api/runs/${this.dataset.run}/report`, target: "_blank", "data-wish": "report" }, this.w("report"))),
      h("div", { "data-part": "alert", class: "wr-alert", role: "alert" }), box("strengths", this.w("strengths")),
      box("checkpoints", this.w("checkpoints")));
  }

  async look() {
    const id = this.dataset.run;
    const run = await this.ask(`/api/runs/${id}`);
    this.part("head", [run.name, run.state, run.run], () => [h("h2", {}, run.name), this.badge(run), h("small", {}, run.run)]);
    this.folder.hidden = this.copy.hidden = !run.comfyui_loads;
    this.without.hidden = run.comfyui_loads;
    if (!this.folder.value && run.comfyui && document.activeElement !== this.folder) this.folder.value = run.comfyui;
    const ends = run.previews.length > 1 ? [run.previews[0], run.previews.at(-1)] : run.previews;
    this.part("pair", run.previews, () => (ends.length ? this.previews({ ...run, previews: ends }) : h("p", { class: "wr-soft" }, this.w("no_previews"))));
    this.part("files", run.finals, () => (run.finals.length ? h("ul", {}, run.finals.map((one, n) => h("li", {}, h("a", { href: `/api/runs/${id}/final/${n}`, download: one.name }, one.place),
      ` ${bytes(one.bytes)}`, one.names ? h("small", { class: "wr-soft" }, ` ${this.known(one.names)}`) : ""))) : h("p", { class: "wr-soft" }, this.w("no_finals"))));
    this.part("strengths", [run.strengths, run.finals.length, run.previews.length], () => this.strengths(run));
    this.part("checkpoints", [run.saved, run.best, run.validation], () => h("ul", {}, run.saved.map((step) => {
      const loss = run.validation.find(([at]) => at === step)?.[1];
      return h("li", {}, this.w("at_step", { step }), loss !== undefined ? ` · ${this.w("validation")} ${loss.toFixed(4)}` : "", step === run.best ? h("b", {}, ` ★ ${this.w("best")}`) : null);
    })));
  }

  /** The part of the results that draws one prompt at several strengths. */
  strengths(run) {
    if (!run.finals.length || !run.previews.length) return h("p", { class: "wr-soft" }, this.w("no_finals"));
    const { prompt, percents, drawing } = run.strengths;
    const choice = h("select", { "aria-label": this.w("prompt") }, run.previews.at(-1).prompts.map((one, n) => h("option", { value: n, selected: one === prompt }, one)));
    const draw = () => this.ask(`/api/runs/${run.id}/strengths`, { number: Number(choice.value) });
    const button = h("button", { "data-wish": "strengths", disabled: drawing, onclick: () => this.tried(draw) }, this.w("strengths_draw"));
    const pictures = percents.map((one) => h("figure", {}, h("img", { src: `/api/runs/${run.id}/strength/${one}?${encodeURIComponent(prompt)}`, alt: `${prompt}, ${one} %` }),
      h("figcaption", {}, `${one} %`)));
    return [h("p", { class: "wr-soft" }, this.w("strengths_text")), h("div", { class: "wr-buttons" }, choice, button),
      h("div", { class: "wr-strengths" }, pictures), drawing ? h("p", { class: "wr-soft", role: "status" }, this.w("strengths_drawing")) : null];
  }
}

customElements.define("wt-run", RunView);
customElements.define("wt-result", ResultView);
