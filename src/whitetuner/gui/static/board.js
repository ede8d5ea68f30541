// <wt-board>: TensorBoard in its tab, started when it is first seen.
import { View, h } from "./view.js";

class BoardView extends View {
  every = 1500;

  draw() {
    this.choice = h("select", { hidden: true, "aria-label": this.w("folder"), onchange: () => this.loop() });
    this.own = h("a", { target: "_blank", href: "/tb/", hidden: true }, this.w("tensorboard_open"));
    this.port = h("small", { class: "wr-soft" });
    this.note = h("p", { class: "wr-soft", role: "status" }, this.w("tensorboard"));
    this.replaceChildren(h("div", { class: "wr-buttons" }, this.choice, this.own, this.port), this.note,
      h("div", { "data-part": "alert", class: "wr-alert", role: "alert" }), (this.place = h("div", {})));
  }

  async look() {
    const found = await this.ask(`/api/tensorboard?folder=${this.choice.value}`);
    if (JSON.stringify(found.folders) !== this.known) {
      this.known = JSON.stringify(found.folders);
      this.choice.replaceChildren(...found.folders.map((one, n) => h("option", { value: n, selected: n === found.chosen }, one)));
    }
    this.choice.hidden = found.folders.length < 2;
    this.own.hidden = !found.ready;
    this.port.textContent = found.ready ? `http://127.0.0.1:${found.port}/` : "";
    this.note.hidden = found.ready;
    this.note.textContent = this.w(found.folders.length ? "tensorboard" : "tensorboard_none");
    if (found.ready && this.seen !== found.folders[found.chosen]) {
      this.seen = found.folders[found.chosen];
      this.place.replaceChildren(h("iframe", { class: "wr-frame", src: "/tb/", title: "TensorBoard" }));
    }
    this.every = found.ready ? 10000 : 1500;
  }
}

customElements.define("wt-board", BoardView);
