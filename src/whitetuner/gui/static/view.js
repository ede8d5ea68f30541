// The ground of the run views: an element that asks the server and draws the answer. Nothing is kept here but what is on
// screen, so a reload, a second browser or a restarted server shows the same.

export let words = {};
export const loadedWords = (async () => {
  for (;;) {
    try {
      words = await (await fetch("/static/run_words.json")).json();
      return;
    } catch { await new Promise((done) => { setTimeout(done, 1000); }); } // the server is away: it comes back
  }
})();

/** The words under a name in a language, {key} in them replaced by values[key] (by nothing where there is none). */
export function wordOf(name, lang, values = {}) {
  const both = words[name];
  if (!both) throw new Error(`no words for ${name}`);
  return both[lang === "zh" ? 0 : 1].replace(/\{(\w+)\}/g, (_, key) => values[key] ?? "");
}

/** An element with properties (on... : listeners) and children; text is always text, never HTML. */
export function h(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((one) => one !== null && one !== undefined && one !== false));
  return made;
}

export const bytes = (count) => (count > 2 ** 30 ? `${(count / 2 ** 30).toFixed(2)} GB` : `${(count / 2 ** 20).toFixed(1)} MB`);
export const gb = (mb) => `${(mb / 1024).toFixed(1)}`;
export const clock = (seconds) => new Date(seconds * 1000).toLocaleString([], { month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit" });

export class Told extends Error {}

/** A part of the page that looks again every second while it is seen. */
export class View extends HTMLElement {
  every = 1000;
  shown = new Map();

  async connectedCallback() {
    if (this.begun) return;
    this.begun = true;
    this.lang = this.dataset.lang === "zh" ? "zh" : "en";
    await loadedWords;
    this.draw();
    this.loop();
  }

  disconnectedCallback() { clearTimeout(this.timer); this.begun = false; }

  async loop() {
    clearTimeout(this.timer);
    if (!this.isConnected) return;
    if (this.offsetParent !== null && !document.hidden) {
      try {
        await this.look();
        this.offline(false);
      } catch (error) {
        if (error instanceof TypeError) this.offline(true);
        else if (error instanceof Told) this.say(error.message);
        else throw error;
      } finally {
        this.timer = setTimeout(() => this.loop(), this.every);
      }
    } else this.timer = setTimeout(() => this.loop(), 250);
  }

  offline(is) {
    if (is && !this.warned) { this.warned = h("p", { class: "wr-offline", role: "status" }, this.w("offline")); this.prepend(this.warned); }
    if (!is && this.warned) { this.warned.remove(); this.warned = null; }
  }

  w(name, values = {}) {
    return wordOf(name, this.lang, values);
  }

  async ask(path, body) {
    const sent = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
    const answer = await fetch(path, { ...sent, headers: { ...sent.headers, "x-language": this.lang } });
    if (answer.status === 401) { location.reload(); throw new Told("401"); }
    const found = await answer.json().catch(() => ({}));
    if (!answer.ok || found.refused) throw new Told(found.refused ?? answer.statusText);
    return found;
  }

  /** Draws a part again only when what it shows has changed. */
  part(name, value, make) {
    const key = JSON.stringify(value);
    if (this.shown.get(name) === key) return;
    this.shown.set(name, key);
    this.querySelector(`[data-part="${name}"]`)?.replaceChildren(...[make()].flat().filter(Boolean));
  }

  say(text) {
    const place = this.querySelector('[data-part="alert"]');
    if (place) place.textContent = text;
  }

  async tried(doing) {
    this.say("");
    try { await doing(); } catch (error) { if (!(error instanceof Told)) throw error; this.say(error.message); }
    this.loop();
  }

  stateWord(run) { return this.w(`state_${run.state}`, { place: run.place ?? "" }); }

  phaseWord(name) {
    const [kind, ...rest] = name.split(" ");
    return kind === "cache" ? this.w("phase_cache", { what: rest.join(" ") }) : words[`phase_${name}`] ? this.w(`phase_${name}`) : name;
  }

  badge(run) { return h("span", { class: `wr-badge wr-${run.state}` }, this.stateWord(run)); }
}

/** Writes tab and run into the address, so that a reload or a copied link shows the same. */
export function remember(change) {
  const now = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of Object.entries(change)) now.set(name, value);
  location.hash = now.toString();
}

/** Gradio forgets its tab on reload: the address remembers it. On a phone tabs lie in a menu and are known by their title alone. */
export function followTabs() {
  document.documentElement.lang = location.pathname.startsWith("/zh") ? "zh-CN" : "en";
  const titles = () => JSON.parse(document.querySelector("[data-tabs]")?.dataset.tabs ?? "{}");
  const inMenu = () => [...document.querySelectorAll("#tabs .overflow-dropdown button")];
  const button = (name) => document.querySelector(`#tab-${CSS.escape(name)}-button`)
    ?? inMenu().find((one) => one.textContent.trim() === titles()[name]);
  const seen = (name) => document.querySelector(`#tab-${CSS.escape(name)}`)?.offsetParent;
  const apply = () => {
    const name = new URLSearchParams(location.hash.slice(1)).get("tab");
    if (name && !seen(name)) button(name)?.click();
    return !name || Boolean(seen(name));
  };
  document.addEventListener("click", (event) => {
    const language = event.target.closest?.('a[href^="/lang/"]');
    if (language) language.hash = location.hash; // the other language shows the same place
    const clicked = event.isTrusted && event.target.closest?.("[role=tab], .overflow-dropdown button");
    const text = clicked ? clicked.textContent.trim() : "";
    const name = Object.keys(titles()).find((one) => titles()[one] === text);
    if (name && clicked.closest("#tabs")) remember({ tab: name });
  });
  addEventListener("hashchange", apply);
  const until = Date.now() + 20000;
  const wait = () => { if (!apply() && Date.now() < until) setTimeout(wait, 100); };
  wait();
}
