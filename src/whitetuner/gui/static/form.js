// A training form: drawn from what the server says of the options, one TOML document behind it that the server keeps.

import { Refused, choosePath, copy, dialog, el, fill, get, openTab, post, save, style, toast } from "/static/widgets.js";
import { ClipCard } from "/static/clips.js";
import { PlanCard } from "/static/plan.js";

const forms = new Map();
const WAIT_MS = 350;
const TIERS = ["basic", "advanced", "expert"];

/** Draws the form of a tab into an element. */
export function mount(place, tab, language) {
  style();
  const form = new Form(place, tab, language);
  forms.set(tab, form);
  form.open();
}

/** The TOML that a form shows, after what was typed has been taken in. */
export async function text(tab) {
  const form = forms.get(tab);
  if (!form) return "";
  await form.settled();
  return form.state?.text ?? "";
}

/** Shows a tab's form with what the server kept for it (after an import, or a run's config taken over). */
export async function reload(tab) {
  await forms.get(tab)?.open();
}

class Form {
  constructor(place, tab, language) {
    Object.assign(this, { place, tab, language, state: null, pending: {}, timer: null, running: null, shown: new Map() });
    this.tier = localStorage.getItem("wt-tier") ?? "basic";
  }

  async open() {
    try {
      this.take(await get(`/api/form/${this.tab}?language=${this.language}`));
    } catch (error) {
      if (error instanceof Refused) this.place.textContent = error.message;
      else setTimeout(() => this.open(), 1500);
    }
  }

  /** A whole answer: what to draw and what it holds. */
  take(found) {
    Object.assign(this, { spec: found.spec, words: found.spec.words, found });
    this.draw();
    this.apply(found.state);
  }

  // -- to the server and back -------------------------------------------------------------------------------------

  change(key, value) {
    this.pending[key] = value;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.send(), WAIT_MS);
  }

  /** Sends what is pending; one request at a time, so that answers come in order. */
  async send(more = {}) {
    clearTimeout(this.timer);
    this.timer = null;
    while (this.running) await this.running;
    const changes = this.pending;
    this.pending = {};
    const body = { text: this.state.text, changes, language: this.language, ...more };
    this.running = this.ask("change", body, changes);
    const answer = await this.running;
    this.running = null;
    if (answer) {
      if (answer.task !== this.state.task) await this.open();
      else this.apply(answer);
    }
    return answer;
  }

  async ask(word, body, changes = null) {
    for (;;) {
      try {
        const answer = await post(`/api/form/${this.tab}/${word}`, body);
        this.place.classList.remove("wt-lost");
        return answer;
      } catch (error) {
        if (error instanceof Refused) {
          toast(error.message, null, "bad");
          return null;
        }
        if (changes === null) {
          toast(this.words.lost, null, "bad");
          return null;
        }
        this.place.classList.add("wt-lost"); // what was typed is kept, and told when the server is there again
        await new Promise((resolve) => setTimeout(resolve, 1500));
      }
    }
  }

  async settled() {
    if (this.timer) await this.send();
    while (this.running) await this.running;
  }

  // -- drawing ----------------------------------------------------------------------------------------------------

  draw() {
    const { words, spec } = this;
    this.shown.clear();
    this.sections = new Map();
    const sections = spec.sections.map(([name, title]) => {
      const body = el("div", { class: "wt-fields" });
      const box = el("details", { class: "wt-section", "data-section": name }, el("summary", {}, title, el("span", { class: "wt-count" })), body);
      this.sections.set(name, { box, body, messages: el("div", { class: "wt-messages" }) });
      box.append(this.sections.get(name).messages);
      return box;
    });
    this.basic = el("div", { class: "wt-fields wt-basic" });
    for (const field of spec.fields) {
      const control = this.field(field, field.key);
      (field.tier === "basic" ? this.basic : this.sections.get(field.section).body).append(control.box);
    }
    this.problems = el("div", { class: "wt-problems", role: "status", "aria-live": "polite" });
    this.editor = el("textarea", { class: "wt-toml", spellcheck: "false", rows: "22", "aria-label": "TOML", autocapitalize: "off", autocomplete: "off" });
    this.editor.addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => ((this.state.text = this.editor.value), this.send()), WAIT_MS * 1.5);
    });
    this.editorMessages = el("div", { class: "wt-messages" });
    this.expert = el("div", { class: "wt-expert" }, this.editor, this.editorMessages);
    this.planCard = new PlanCard(this);
    this.clipCard = spec.films ? new ClipCard(this) : null;
    this.rest = el("div", { class: "wt-rest" }, ...sections);
    this.place.replaceChildren(this.top(), this.basic, this.clipCard?.box ?? "", this.tiers(), this.expert, this.rest, this.planCard.box, this.problems);
    this.look(this.tier);
  }

  top() {
    const { words, found } = this;
    const goal = el("select", { "aria-label": words.goal, onchange: () => goal.value && this.send({ goal: goal.value }) });
    goal.append(el("option", { value: "" }, words.goal_none));
    for (const [key, title, help] of found.goals) goal.append(el("option", { value: key, title: help }, `${title} · ${help}`));
    const preset = el("select", { "aria-label": words.preset, class: "wt-preset", onchange: () => preset.value && this.preset(preset.value) });
    preset.append(el("option", { value: "" }, words.preset_none));
    const group = (label, names, own) => {
      if (!names.length) return;
      const inside = names.map(([name, title]) => el("option", { value: JSON.stringify([name, own]) }, title ? `${name} · ${title}` : name));
      preset.append(el("optgroup", { label }, ...inside));
    };
    group(words.built_in, found.presets, false);
    group(words.own_presets, found.own_presets.map((name) => [name, ""]), true);
    const file = el("input", { type: "file", accept: ".toml,.yaml,.yml,.json,.sh,.bat,.ps1,text/plain", class: "wt-hidden", tabindex: "-1", "aria-hidden": "true" });
    file.addEventListener("change", () => file.files[0] && this.importFile(file.files[0]));
    const button = (label, run) => el("button", { type: "button", onclick: run }, label);
    const tasks = el("div", { class: "wt-tasks", role: "radiogroup" });
    if (this.spec.tasks.length > 1) {
      for (const [task, label] of this.spec.tasks) {
        const radio = el("input", { type: "radio", name: `task-${this.tab}`, value: task, onchange: () => (this.change("model.task", task), this.send()) });
        radio.checked = task === found.state.task;
        tasks.append(el("label", {}, radio, ` ${label}`));
      }
    }
    return el(
      "div",
      { class: "wt-top" },
      tasks.childElementCount ? tasks : null,
      el("label", { class: "wt-pick" }, words.goal, goal),
      el("label", { class: "wt-pick" }, words.preset, preset),
      el(
        "div",
        { class: "wt-buttons" },
        button(words.save_preset, () => this.keepPreset()),
        button(words.import, () => file.click()),
        file,
        button(words.command, () => this.command()),
        button(words.fresh, () => this.replace("")),
      ),
    );
  }

  tiers() {
    const bar = el("div", { class: "wt-tiers", role: "tablist" });
    for (const tier of TIERS) {
      bar.append(el("button", { type: "button", role: "tab", "data-tier": tier, onclick: () => this.look(tier) }, this.words[tier]));
    }
    this.search = el("input", { type: "search", placeholder: this.words.search, "aria-label": this.words.search, oninput: () => this.look(this.tier) });
    return el("div", { class: "wt-bar" }, bar, this.search);
  }

  /** Which options are to be seen: the tier's, those that were set, those with a mistake, those searched for. */
  look(tier) {
    this.tier = tier;
    localStorage.setItem("wt-tier", tier);
    const wanted = this.search.value.trim().toLowerCase();
    for (const button of this.place.querySelectorAll("[data-tier]")) button.setAttribute("aria-selected", button.dataset.tier === tier);
    for (const field of this.spec.fields) {
      const control = this.shown.get(field.key);
      if (!control || field.tier === "basic") continue;
      const about = `${field.key} ${field.label} ${field.help}`.toLowerCase();
      const inTier = tier === "expert" || (tier === "advanced" && (field.tier === "advanced" || control.set));
      control.box.hidden = !(wanted ? about.includes(wanted) : inTier || control.wrong);
    }
    for (const { box, body, messages } of this.sections.values()) {
      box.hidden = ![...body.children].some((one) => !one.hidden) && !messages.childElementCount;
      if (wanted) box.open = true;
    }
    this.expert.hidden = tier !== "expert" && !this.state?.broken;
  }

  // -- one option -------------------------------------------------------------------------------------------------

  field(field, key) {
    if (field.kind === "rows") return this.rows(field, key);
    const id = `f-${this.tab}-${key.replace(/[^\w]+/g, "-")}`;
    const { words } = this;
    const input = this.input(field, key, id);
    const reset = el("button", { type: "button", class: "wt-reset", title: words.unset, "aria-label": `${words.unset}: ${field.label}`, hidden: true }, "↺");
    const messages = el("div", { class: "wt-messages", id: `${id}-messages`, "aria-live": "polite" });
    const note = el("small", { class: "wt-note" });
    const help = el("small", { class: "wt-help", id: `${id}-help` }, field.help);
    if (field.later) {
      const some = [...(field.default ? [field.default] : []), ...field.later];
      help.append(el("em", {}, ` (${some.length && field.later.length ? fill(words.so_far, { values: some.join(", ") }) : words.not_yet})`));
    }
    const box = el(
      "div",
      { class: `wt-field wt-k-${field.kind}`, "data-key": key },
      el("div", { class: "wt-label" }, el("label", { for: id }, field.label), el("code", { title: key }, key.replace(/^(.*\]|model\.options)\./, "")), reset),
      el("div", { class: "wt-control" }, input, ...this.buttons(field, key, input)),
      help,
      note,
      messages,
    );
    const control = { field, key, box, input, reset, messages, note, set: false, wrong: false };
    reset.addEventListener("click", () => {
      this.show(control, null);
      this.change(key, null);
      this.send();
    });
    input.setAttribute("aria-describedby", `${id}-help ${id}-messages`);
    this.shown.set(key, control);
    return control;
  }

  input(field, key, id) {
    const { words } = this;
    if (field.kind === "bool") {
      return el("input", { id, type: "checkbox", onchange: (event) => this.typed(key, event.target.checked) });
    }
    if (field.kind === "choice") {
      const select = el("select", { id, onchange: (event) => this.typed(key, event.target.value === "" ? null : event.target.value, true) });
      const said = field.choices.find(([value]) => value === field.default)?.[1] ?? field.default ?? "";
      select.append(el("option", { value: "" }, said === "" ? "—" : `${words.default}: ${said}`));
      for (const [value, label] of field.choices) select.append(el("option", { value }, label));
      return select;
    }
    const listen = { oninput: (event) => this.typed(key, event.target.value), onchange: () => this.send(), spellcheck: "false", autocomplete: "off" };
    if (["long", "paths", "texts", "table"].includes(field.kind)) {
      const rows = field.kind === "long" ? 2 : 3;
      return el("textarea", { id, rows, ...listen, placeholder: field.kind === "long" ? field.default ?? "" : words.one_a_line });
    }
    const input = el("input", { id, type: "text", ...listen, placeholder: field.default ?? "" });
    if (field.kind === "number") input.setAttribute("inputmode", field.choices ? "text" : "decimal");
    if (field.kind === "number" && field.choices) {
      input.setAttribute("list", `${id}-words`);
      input.dataset.words = field.choices.map(([value]) => value).join(" ");
    }
    return input;
  }

  buttons(field, key, input) {
    const { words } = this;
    const found = [];
    if (field.choices && field.kind === "number") {
      found.push(el("datalist", { id: `${input.id}-words` }, ...field.choices.map(([value, label]) => el("option", { value }, label))));
    }
    if (field.wants) {
      const several = field.kind === "paths";
      const label = `${several ? words.add : words.browse}`;
      const choose = async () => {
        const last = input.value.trim().split("\n").pop();
        const path = await choosePath(field.wants, last.startsWith("builtin:") ? "" : last, words, this.language, this.found.native);
        if (path) this.set(key, several && input.value.trim() ? `${input.value.trim()}\n${path}` : path);
      };
      found.push(el("button", { type: "button", class: "wt-browse", "aria-label": `${label}: ${field.label}`, onclick: choose }, several ? `+ ${label}` : label));
    }
    const make = (what, label, title) => el("button", { type: "button", class: "wt-make", title, onclick: (event) => this.make(what, event.target) }, label);
    if (key === "model.path") {
      found.push(make("model", words.tiny, words.tiny_help));
      if (this.spec.nano) found.push(el("button", { type: "button", class: "wt-make", onclick: () => this.set(key, "builtin:nano") }, words.nano));
    }
    if (["data.images", "data.target", "data.videos"].includes(key)) {
      found.push(make("data", words.sample, ""));
      found.push(el("button", { type: "button", class: "wt-make", onclick: () => this.lookAtData() }, words.look_data));
    }
    return found;
  }

  rows(field, key) {
    const { words } = this;
    const list = el("div", { class: "wt-rows" });
    const add = el("button", { type: "button", class: "wt-add", onclick: () => this.send({ add: key }) }, `+ ${words.add}`);
    const messages = el("div", { class: "wt-messages" });
    const box = el("div", { class: "wt-field wt-rowsfield", "data-key": key }, el("div", { class: "wt-label" }, el("span", { class: "wt-title" }, field.label), el("code", {}, key)), el("small", { class: "wt-help" }, field.help), list, add, messages);
    const control = { field, key, box, list, messages, count: -1, set: false, wrong: false };
    this.shown.set(key, control);
    return control;
  }

  drawRows(control, count) {
    if (control.count === count) return;
    control.count = count;
    control.set = count > 0;
    const open = control.field.key === "data.sets" ? ["images", "target", "conditions", "videos", "repeats", "weight"] : ["text", "size", "seed", "images"];
    control.list.replaceChildren();
    for (let number = 0; number < count; number++) {
      const more = el("details", { class: "wt-more" }, el("summary", {}, this.words.advanced));
      const row = el("fieldset", {}, el("legend", {}, fill(this.words.number, { number: number + 1 })));
      const folds = [];
      for (const inner of control.field.rows) {
        const name = inner.key.split(".").pop();
        const one = this.field(inner, `${control.key}[${number}].${name}`).box;
        if (open.includes(name)) row.append(one);
        else folds.push(one);
      }
      more.append(...folds);
      const remove = el("button", { type: "button", class: "wt-remove", onclick: () => ((control.count = -1), this.send({ remove: [control.key, number] })) }, `✕ ${this.words.remove}`);
      row.append(more, remove);
      control.list.append(row);
    }
  }

  typed(key, value, now = false) {
    const control = this.shown.get(key);
    control.set = value !== null && value !== "";
    control.box.classList.toggle("wt-set", control.set);
    control.reset.hidden = !control.set;
    this.change(key, value);
    if (now) this.send();
  }

  /** A value that did not come from the keyboard. */
  set(key, value) {
    const control = this.shown.get(key);
    this.show(control, value);
    this.change(key, value);
    return this.send();
  }

  show(control, value) {
    const { input, field } = control;
    control.set = value !== null && value !== undefined;
    control.box.classList.toggle("wt-set", control.set);
    control.reset.hidden = !control.set;
    if (field.kind === "bool") input.checked = control.set ? value : field.default === true;
    else if (input.value !== (value ?? "")) input.value = value ?? "";
    if (field.kind === "choice" && control.set && input.value !== value) {
      input.append(el("option", { value }, value)); // a word that the schema refuses is still what the file says
      input.value = value;
    }
  }

  // -- what the server says ---------------------------------------------------------------------------------------

  apply(state) {
    const { words } = this;
    this.state = state;
    for (const [key, count] of Object.entries(state.rows)) {
      const control = this.shown.get(key);
      if (!control) continue;
      for (const known of [...this.shown.keys()]) if (known.startsWith(`${key}[`) && control.count !== count) this.shown.delete(known);
      this.drawRows(control, count);
    }
    const told = new Set();
    let count = 0;
    for (const control of this.shown.values()) {
      const busy = control.input === document.activeElement || control.key in this.pending;
      if (control.input && !busy && !state.broken) this.show(control, state.values[control.key] ?? null);
      const wrong = state.errors[control.key] ?? [];
      this.messages(control.messages, wrong, state.warnings[control.key] ?? []);
      control.wrong = wrong.length > 0;
      count += wrong.length;
      control.box.classList.toggle("wt-wrong", control.wrong);
      control.box.classList.toggle("wt-needed", state.needed.includes(control.key));
      if (control.input) {
        control.input.setAttribute("aria-invalid", control.wrong);
        const note = state.notes[control.key] ?? "";
        const [text, source] = state.defaults[control.key] ?? [control.field.default, ""];
        if (control.note.textContent !== note) control.note.textContent = note;
        if (control.input.placeholder !== undefined && !["paths", "texts", "table"].includes(control.field.kind)) control.input.placeholder = text ?? "";
        control.box.title = source ? fill(words.source, { source }) : "";
      }
      if (wrong.length) told.add(control.key);
    }
    for (const [name, { box, messages }] of this.sections) {
      const wrong = state.errors[name] ?? [];
      this.messages(messages, wrong, state.warnings[name] ?? []);
      count += wrong.length;
      if (wrong.length) told.add(name);
      const inside = [...box.querySelectorAll(".wt-field")];
      const bad = inside.filter((one) => one.classList.contains("wt-wrong")).length + wrong.length;
      const set = inside.filter((one) => one.classList.contains("wt-set")).length;
      box.querySelector(".wt-count").textContent = bad ? ` ⚠ ${bad}` : set ? ` · ${set}` : "";
      if (bad) box.open = true;
    }
    const rest = Object.entries(state.errors).filter(([key]) => !told.has(key));
    const others = rest.flatMap(([key, all]) => all.map(([what, mend]) => [key ? `${key}: ${what}` : what, mend]));
    count += others.length;
    if (this.editor !== document.activeElement) this.editor.value = state.text;
    this.messages(this.editorMessages, state.broken ? others : [], []);
    this.problems.replaceChildren();
    if (count) {
      const first = () => {
        const one = this.place.querySelector(".wt-wrong, .wt-messages .wt-error");
        if (one) one.scrollIntoView({ block: "center", behavior: "smooth" });
        one?.querySelector("input, select, textarea")?.focus();
      };
      this.problems.append(el("span", { class: "wt-bad" }, `⚠ ${fill(words.errors, { count })} `), el("button", { type: "button", onclick: first }, words.show_first));
      const list = el("div", { class: "wt-messages" });
      this.messages(list, others, []);
      if (!state.broken) this.problems.append(list);
    } else if (state.needed.length) {
      const labels = state.needed.map((key) => this.spec.fields.find((field) => field.key === key)?.label ?? key);
      this.problems.append(el("span", { class: "wt-note" }, fill(words.needed, { names: labels.join(words.comma) })));
    } else {
      this.problems.append(el("span", { class: "wt-good" }, `✓ ${words.ready}`));
      const advice = el("div", { class: "wt-messages" });
      this.messages(advice, [], state.warnings[""] ?? []);
      this.problems.append(advice);
    }
    this.place.dataset.ok = state.ok;
    this.look(this.tier);
    this.planCard.follow(state);
    this.clipCard?.follow(state);
    this.place.dispatchEvent(new CustomEvent("wt-state", { bubbles: true, detail: { tab: this.tab, ok: state.ok, errors: count } }));
  }

  messages(place, errors, warnings) {
    const line = (kind, [what, mend]) => el("p", { class: `wt-${kind}` }, what, mend ? el("span", {}, ` → ${mend}`) : "");
    place.replaceChildren(...errors.map((one) => line("error", one)), ...warnings.map((one) => line("warning", one)));
  }

  // -- whole documents --------------------------------------------------------------------------------------------

  /** Another document in place of this one, with a way back. */
  async replace(text, word = null, body = {}) {
    await this.settled();
    // A field that is being typed into is left alone by what comes from the server; here the whole document goes.
    if (this.place.contains(document.activeElement)) document.activeElement.blur();
    await this.settled(); // blurring may have sent a last change
    const before = this.state.text;
    if (word) {
      const answer = await this.ask(word, { language: this.language, ...body });
      if (!answer) return null;
      this.take(answer);
    } else {
      const fresh = text || `[model]\nfamily = ${JSON.stringify(this.family())}\n${this.spec.tasks[0][0] === "t2i" ? "" : `task = ${JSON.stringify(this.spec.tasks[0][0])}\n`}`;
      this.state.text = fresh;
      await this.send();
    }
    if (this.state.text !== before) {
      toast(this.words.replaced, { label: this.words.undo, run: () => ((this.state.text = before), this.send().then(() => this.open())) });
    }
    return true;
  }

  family() {
    return this.spec.family;
  }

  preset(value) {
    const [name, own] = JSON.parse(value);
    return this.replace("", "preset", { name, own });
  }

  async keepPreset() {
    await this.settled();
    const name = await dialog(this.words.save_preset, this.words, (box, close) => {
      const input = el("input", { type: "text", "aria-label": this.words.preset_name, placeholder: this.words.preset_name, maxlength: "60" });
      const done = () => input.value.trim() && close(input.value);
      input.addEventListener("keydown", (event) => event.key === "Enter" && (event.preventDefault(), done()));
      box.append(input, el("footer", {}, el("button", { type: "button", class: "wt-main", onclick: done }, this.words.save)));
    });
    if (!name) return;
    const answer = await this.ask("keep_preset", { name, text: this.state.text, language: this.language });
    if (!answer) return;
    this.take(answer);
    toast(fill(this.words.preset_saved, { name: answer.name }));
  }

  /** How many settings of another trainer's config have no place here; they stand as comments on top of the text. */
  left(answer) {
    const said = [answer.left && fill(this.words.imported_left, { left: answer.left }), answer.moved && fill(this.words.imported_moved, { moved: answer.moved })];
    return said.filter(Boolean).map((one) => ` ${one}`).join("");
  }

  async importFile(file) {
    await this.settled();
    const before = this.state.text;
    const answer = await this.ask("imported", { text: await file.text(), name: file.name, language: this.language });
    if (!answer) return;
    if (answer.tab !== this.tab) {
      toast(fill(this.words.imported_elsewhere, { title: answer.title }) + this.left(answer));
      openTab(answer.tab, answer.title);
      reload(answer.tab);
      return;
    }
    this.take(answer);
    toast(fill(this.words.imported, { name: file.name }) + this.left(answer), { label: this.words.undo, run: () => ((this.state.text = before), this.send().then(() => this.open())) });
  }

  async command() {
    await this.settled();
    const found = await this.ask("command", { text: this.state.text, language: this.language });
    if (!found) return;
    const { words } = this;
    await dialog(words.command, words, (box) => {
      const code = (text) => el("div", { class: "wt-code" }, el("pre", {}, text), el("button", { type: "button", onclick: () => copy(text, words) }, words.copy));
      box.append(
        el("p", {}, words.command_help),
        el("button", { type: "button", onclick: () => save(found.file, this.state.text) }, `${words.download}: ${found.file}`),
        code(found.run.join("\n")),
        el("p", {}, words.command_sets),
        code(found.sets.join(" ")),
      );
    });
  }

  async make(what, button) {
    await this.settled();
    const before = button.textContent;
    Object.assign(button, { disabled: true, textContent: this.words.working });
    const answer = await this.ask("make", { text: this.state.text, what, language: this.language });
    Object.assign(button, { disabled: false, textContent: before });
    if (!answer) return;
    this.apply(answer.state);
    toast(fill(this.words.made, { path: answer.path }));
  }

  async lookAtData() {
    await this.settled();
    sessionStorage.setItem("wt-data", JSON.stringify({ tab: this.tab, text: this.state.text }));
    openTab("data", this.words.data_tab);
    window.dispatchEvent(new Event("wt-data"));
  }
}
