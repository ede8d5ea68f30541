// Small things that the pages share: elements, requests, a toast, the page's own browser for files and folders.

/** An element. attributes: as written in HTML; on...: listeners; text goes in as text, never as markup. */
export function el(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.startsWith("aria-") && value !== null && value !== undefined) made.setAttribute(key, String(value));
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...inside.filter((one) => one !== null && one !== undefined));
  return made;
}

/** A text with {names} filled in. */
export function fill(text, values) {
  return (text ?? "").replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** What the server refused, in the page's language: refused is [[where, what, mend], ...]. */
export class Refused extends Error {
  constructor(errors) {
    super(errors.map(([where, what, mend]) => (where ? `${where}: ` : "") + what + (mend ? ` → ${mend}` : "")).join("\n"));
    this.errors = errors;
  }
}

/** JSON to the server and back. Throws Refused, or TypeError when the server does not answer. */
export async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  return answered(answer);
}

export async function get(path) {
  return answered(await fetch(path));
}

/** The JSON of an answer. Throws Refused for what the user can mend, and for a server that refuses. */
export async function answered(answer) {
  let found = null;
  try {
    found = await answer.json();
  } catch {
    found = null;
  }
  if (answer.status === 401) location.reload();
  if (answer.ok && found && !found.refused) return found;
  throw new Refused(found?.refused ?? [["", `${answer.status} ${answer.statusText}`, ""]]);
}

/** A word at the foot of the page, for a few seconds; with an action it stays longer. */
export function toast(text, action = null, kind = "info") {
  let holder = document.querySelector(".wt-toasts");
  if (!holder) {
    holder = el("div", { class: "wt-toasts", "aria-live": "polite" });
    document.body.append(holder);
  }
  const one = el("div", { class: `wt-toast wt-${kind}`, role: kind === "bad" ? "alert" : "status" }, el("span", {}, text));
  if (action) {
    one.append(el("button", { type: "button", onclick: () => (one.remove(), action.run()) }, action.label));
  }
  holder.append(one);
  setTimeout(() => one.remove(), action ? 12000 : kind === "bad" ? 8000 : 3500);
}

/** The style of these pages, once. */
export function style() {
  if (document.getElementById("wt-style")) return;
  document.head.append(el("link", { id: "wt-style", rel: "stylesheet", href: "/static/form.css" }));
}

/** Text onto the clipboard, also where the page is not served over https. */
export async function copy(text, words) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "wt-hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(words.copied);
}

/** A file for the user to keep. */
export function save(name, text) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "application/toml" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** A dialog with a heading; resolves with what `close(value)` is given, null when it is dismissed. */
export function dialog(title, words, build) {
  return new Promise((resolve) => {
    let value = null;
    const box = el("dialog", { class: "wt-dialog", "aria-label": title });
    const close = (given = null) => ((value = given), box.close());
    box.addEventListener("close", () => (box.remove(), resolve(value)));
    box.append(
      el("header", {}, el("h3", {}, title), el("button", { type: "button", "aria-label": words.close, onclick: () => close() }, "✕")),
    );
    document.body.append(box);
    build(box, close);
    box.showModal();
  });
}

/** Asks for a file or folder: the desktop's dialog where there is one, else the page's own list. Resolves with a path or null. */
export async function choosePath(wants, start, words, language, native) {
  if (native && wants !== "any") {
    toast(words.asking);
    try {
      return (await post("/api/path/ask", { wants, start, language })).path || null;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      toast(error.message, null, "bad");
    }
  }
  return dialog(words.browse, words, (box, close) => {
    const where = el("input", { type: "text", class: "wt-path", spellcheck: "false", "aria-label": words.browse });
    const tops = el("div", { class: "wt-tops" });
    const list = el("ul", { class: "wt-list" });
    const note = el("p", { class: "wt-note" });
    const go = async (path) => {
      try {
        show(await post("/api/path/list", { path, language }));
      } catch (error) {
        note.textContent = error.message;
      }
    };
    const row = (mark, name, run, more = "") =>
      el("li", {}, el("button", { type: "button", onclick: run }, el("span", { "aria-hidden": "true" }, mark), ` ${name}`, el("small", {}, more)));
    const show = (found) => {
      const inside = (name) => (found.path.endsWith(found.separator) ? found.path + name : found.path + found.separator + name);
      where.value = found.path;
      tops.replaceChildren(...found.tops.map((top) => el("button", { type: "button", onclick: () => go(top) }, top)));
      list.replaceChildren();
      if (found.parent !== null) list.append(row("↑", words.up, () => go(found.parent)));
      for (const name of found.folders) list.append(row("▸", name, () => go(inside(name))));
      for (const [name, bytes] of found.files) {
        const size = bytes > 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : bytes > 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${Math.ceil(bytes / 1e3)} kB`;
        const one = row("·", name, () => close(inside(name)), size);
        if (wants === "folder") one.firstChild.disabled = true;
        list.append(one);
      }
      if (!found.folders.length && !found.files.length) list.append(el("li", { class: "wt-note" }, words.empty));
      note.textContent =
        (found.pictures ? fill(words.holds, { pictures: found.pictures }) : "") + (found.more ? ` ${fill(words.more_entries, { count: found.more })}` : "");
    };
    where.addEventListener("keydown", (event) => event.key === "Enter" && (event.preventDefault(), go(where.value)));
    const foot = el("footer", {}, note);
    if (wants !== "file") foot.append(el("button", { type: "button", class: "wt-main", onclick: () => close(where.value) }, words.choose_here));
    box.append(where, tops, list, foot);
    go(start);
  });
}

/** Goes to another tab of the page; the address follows. On a phone its button is in Gradio's menu of further tabs. */
export function openTab(key, title) {
  const now = new URLSearchParams(location.hash.slice(1));
  now.set("tab", key);
  location.hash = now.toString();
  const inMenu = [...document.querySelectorAll("#tabs .overflow-dropdown button")];
  (document.getElementById(`tab-${key}-button`) ?? inMenu.find((one) => one.textContent.trim() === title))?.click();
}
