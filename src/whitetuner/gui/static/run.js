// The tabs around the forms: home, the list of runs, the right column of the training tabs. Loads the other views.
import "./board.js";
import "./run_view.js";
import { View, clock, followTabs, gb, h, remember } from "./view.js";

/** <wt-runs>: queue and history, and the chosen run below. */
class RunList extends View {
  draw() {
    this.replaceChildren(h("h3", {}, this.w("list")), h("div", { "data-part": "list" }), (this.place = h("div", {})));
    addEventListener("hashchange", () => this.loop());
  }

  get chosen() { return new URLSearchParams(location.hash.slice(1)).get("run") ?? ""; }

  async look() {
    const { runs } = await this.ask("/api/runs");
    const chosen = this.chosen;
    this.part("list", [runs, chosen], () => (runs.length ? this.table(runs, chosen) : h("p", { class: "wr-soft" }, this.w("no_runs"))));
    if (!chosen || !runs.some((one) => one.id === chosen)) {
      this.place.replaceChildren(h("p", { class: "wr-soft" }, runs.length ? this.w("choose") : ""));
      this.view = null;
    } else if (this.view?.dataset.run !== chosen) {
      this.view = h(this.dataset.view ?? "wt-run", { "data-run": chosen, "data-lang": this.lang });
      this.place.replaceChildren(this.view);
    }
  }

  table(runs, chosen) {
    const rows = runs.slice(0, 200).map((run) => h("tr", { class: run.id === chosen ? "wr-chosen" : "", onclick: () => remember({ run: run.id }) },
      h("td", {}, h("a", { href: `#run=${run.id}`, onclick: (event) => event.preventDefault() }, run.name)), h("td", {}, this.badge(run)),
      h("td", {}, run.step !== null ? `${run.step}/${run.steps ?? "?"}` : ""), h("td", {}, [run.family, run.task, run.method].filter(Boolean).join(" · ")),
      h("td", {}, clock(run.asked_at))));
    const heads = ["name", "state", "step", "model", "when"].map((name) => h("th", { scope: "col" }, this.w(name)));
    return h("div", { class: "wr-list" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows)));
  }
}

/** <wt-train data-tab data-family data-tasks>: start, stop, log and numbers beside a form. */
class TrainView extends View {
  draw() {
    this.start = h("button", { class: "wr-main", "data-wish": "start", onclick: () => this.tried(() => this.begin("")) }, this.w("start"));
    this.stop = h("button", { disabled: true, "data-wish": "stop", onclick: () => this.view.tried(() => this.view.asked("stop")) }, this.w("stop"));
    this.addEventListener("run", ({ detail }) => { this.stop.disabled = !detail.can.includes("stop"); });
    this.gpus = h("select", { hidden: true, "aria-label": this.w("devices") });
    this.place = h("div", {});
    this.replaceChildren(h("div", { class: "wr-buttons" }, this.start, this.stop, this.gpus), h("div", { "data-part": "alert", class: "wr-alert", role: "alert" }),
      h("div", { "data-part": "exists" }), h("div", { "data-part": "which", class: "wr-which" }), this.place);
  }

  async begin(existing) {
    this.start.disabled = true;
    try {
      const form = await import("/static/form.js");
      const text = await form.text(this.dataset.tab);
      const found = await this.ask("/api/start", { tab: this.dataset.tab, text, gpus: this.gpus.hidden ? "" : this.gpus.value, existing });
      this.shown.delete("exists");
      this.part("exists", found, () => (found.exists ? this.choice(found) : []));
      if (found.id) this.started = found.id;
    } finally { this.start.disabled = false; }
  }

  choice(found) {
    const one = (how, label) => h("button", { "data-existing": how, onclick: () => this.tried(() => this.begin(how)) }, label);
    return h("div", { class: "wr-why" }, h("p", {}, this.w("exists", { name: found.name, state: this.stateWord({ state: found.exists }) })),
      h("div", { class: "wr-buttons" }, one("resume", this.w("exists_resume")), one("other", this.w("exists_other", found))));
  }

  async look() {
    const { runs, machine } = await this.ask("/api/runs");
    const cards = machine.devices.filter((one) => one.index !== null);
    this.gpus.hidden = cards.length < 2;
    if (this.gpus.options.length === 0 && cards.length > 1) {
      this.gpus.append(h("option", { value: "" }, this.w("any")), ...cards.map((one) => h("option", { value: one.index }, `GPU ${one.index} ${one.title}`)));
      for (let count = 2; count <= cards.length; count++) {
        this.gpus.append(h("option", { value: count === cards.length ? cards.map((one) => one.index).join(",") : `any:${count}` },
          this.w(count === cards.length ? "all_gpus" : "so_many_gpus", { count })));
      }
    }
    const tasks = this.dataset.tasks.split(" ");
    const mine = runs.filter((one) => one.family === this.dataset.family && tasks.includes(one.task));
    const run = runs.find((one) => one.id === this.started) ?? mine.find((one) => one.state === "running") ?? mine[0];
    this.part("which", run?.id ?? "", () => (run ? h("a", { href: `#tab=runs&run=${run.id}` }, this.w("open_run")) : h("p", { class: "wr-soft" }, this.w("none_here"))));
    if (run && this.view?.dataset.run !== run.id) {
      this.view = h("wt-run", { "data-run": run.id, "data-lang": this.lang, "data-small": true });
      this.place.replaceChildren(this.view);
    }
  }
}

/** <wt-home>: try it, the machine, the last runs. */
class HomeView extends View {
  every = 2000;

  draw() {
    const start = async () => {
      button.disabled = true;
      try { remember({ tab: "runs", run: (await this.ask("/api/try", {})).id }); } finally { button.disabled = false; }
    };
    const button = h("button", { class: "wr-main wr-try", "data-wish": "try", onclick: () => this.tried(start) }, this.w("try"));
    this.replaceChildren(h("section", { class: "wr-hero" }, button, h("p", {}, this.w("try_text")), h("div", { "data-part": "alert", class: "wr-alert", role: "alert" }),
      h("p", { class: "wr-soft" }, this.w("how"))), h("section", {}, h("h3", {}, this.w("machine")), h("div", { "data-part": "machine", class: "wr-tiles" })),
      h("section", {}, h("h3", {}, this.w("recent")), h("div", { "data-part": "recent" })));
  }

  async look() {
    const { runs, machine } = await this.ask("/api/runs");
    this.part("machine", machine, () => [...machine.devices.map((one) => h("div", { class: "wr-tile" }, h("span", {}, one.index === null ? one.title : `GPU ${one.index}`),
      h("b", {}, one.total_mb ? `${gb(one.used_mb ?? 0)}/${gb(one.total_mb)} GB` : "–"), h("small", {}, one.index === null ? "" : one.title))),
    h("div", { class: "wr-tile" }, h("span", {}, this.w("ram")), h("b", {}, `${machine.ram_used_gb}/${machine.ram_gb} GB`))]);
    const recent = runs.slice(0, 6);
    this.part("recent", recent, () => (recent.length ? recent.map((run) => h("a", { class: "wr-card", href: `#tab=runs&run=${run.id}` }, h("b", {}, run.name), " ",
      this.badge(run), h("small", {}, `${run.step ?? 0}/${run.steps ?? "?"} · ${clock(run.asked_at)}`))) : h("p", { class: "wr-soft" }, this.w("no_runs"))));
  }
}

customElements.define("wt-runs", RunList);
customElements.define("wt-train", TrainView);
customElements.define("wt-home", HomeView);
followTabs();
