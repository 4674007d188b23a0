// The list of conversations: found, opened, renamed, deleted and brought back, taken out and in as text.

import { ask, download, find, h, offerUndo, tell } from "./dom.mjs";
import { fromFile, toJson, toMarkdown } from "./transfer.mjs";
import { pathTo } from "./tree.mjs";

const DAY_MS = 86_400_000;

export class ListView {
  #store;
  #on;
  #current = null;
  #number = 0;

  /** `on`: `{open(id), begin(), changed(id)}`; `changed`: a conversation has another name, or is gone. */
  constructor(store, on) {
    this.#store = store;
    this.#on = on;
    find("new").addEventListener("click", () => on.begin());
    find("search").addEventListener("input", () => this.draw());
    find("talks-import").addEventListener("click", () => find("talks-file").click());
    find("talks-file").addEventListener("change", (event) => this.#import(event.target));
    find("talks-export").addEventListener("click", () => this.#attempt(() => this.#exportAll()));
  }

  /** The one that is shown. */
  set current(id) {
    this.#current = id;
    this.draw();
  }

  async draw() {
    const number = ++this.#number;
    const words = find("search").value.trim();
    const [all, found] = await Promise.all([this.#store.conversations(), words ? this.#store.search(words) : null]);
    if (number !== this.#number) return; // a later one has overtaken it
    const shown = found === null ? all : all.filter(({ id }) => found.has(id));
    const none = all.length === 0 ? "None yet: what you say is kept here." : "Nothing is found.";
    const focused = find("talks").contains(document.activeElement) ? document.activeElement.dataset.action : undefined;
    find("talks").replaceChildren(
      ...(shown.length > 0 ? shown.map((record) => this.#item(record)) : [h("li", { class: "hint" }, none)]),
    );
    if (focused) find("talks").querySelector(`[data-action="${focused}"]`)?.focus();
    find("talks-export").disabled = all.length === 0;
    find("search").disabled = all.length === 0 && words === "";
  }

  #item(record) {
    const isCurrent = record.id === this.#current;
    const title = record.title || "Untitled";
    const open = () => this.#on.open(record.id);
    const name = h("button", { type: "button", class: "talk", "data-action": `open ${record.id}`, onclick: open });
    name.append(h("span", { class: "name", dir: "auto" }, title), h("span", { class: "when" }, when(record.updated)));
    if (!isCurrent) return h("li", {}, name);
    name.setAttribute("aria-current", "true");
    const button = (text, action) =>
      h(
        "button",
        { type: "button", class: "quiet", "aria-label": `${text}: ${title}`, "data-action": text, onclick: () => this.#attempt(action) },
        text,
      );
    return h(
      "li",
      { class: "current" },
      name,
      h(
        "div",
        { class: "row" },
        button("Rename", () => this.#rename(record)),
        button("Markdown", () => this.#export(record, "md")),
        button("JSON", () => this.#export(record, "json")),
        button("Delete", () => this.#delete(record)),
      ),
    );
  }

  async #rename(record) {
    const title = await ask({ title: "Rename this conversation", label: "Name", value: record.title, ok: "Rename" });
    if (!title) return;
    await this.#store.change(record.id, (stored) => Object.assign(stored, { title, hasName: true }));
    await this.#on.changed(record.id);
  }

  async #delete(record) {
    const mark = (deleted) => this.#store.change(record.id, (stored) => Object.assign(stored, { deleted }));
    await mark(Date.now());
    await this.#on.changed(record.id);
    offerUndo(`“${record.title}” is deleted.`, async () => {
      await mark(null);
      await this.#on.open(record.id);
    });
  }

  async #export(record, kind) {
    const turns = await this.#store.turns(record.id);
    const name = `${record.title || "conversation"}.${kind}`;
    if (kind === "json") return download(name, toJson([{ record, turns }]), "application/json");
    const path = pathTo(new Map(turns.map((turn) => [turn.id, turn])), record.leaf);
    return download(name, toMarkdown(record, path), "text/markdown");
  }

  async #exportAll() {
    const records = await this.#store.conversations();
    const talks = await Promise.all(records.map(async (record) => ({ record, turns: await this.#store.turns(record.id) })));
    download("conversations.json", toJson(talks), "application/json");
  }

  async #import(input) {
    const files = [...input.files];
    input.value = "";
    await this.#attempt(async () => {
      let last = null;
      for (const file of files) {
        const talks = fromFile(file.name, await file.text());
        await this.#store.add(talks.map(({ record }) => record), talks.flatMap(({ turns }) => turns));
        last = talks.at(-1).record.id;
      }
      if (last !== null) await this.#on.open(last);
    });
  }

  async #attempt(action) {
    try {
      tell(find("talks-error"), null);
      await action();
    } catch (error) {
      tell(find("talks-error"), error);
    }
  }
}

/** A time as people say it. */
function when(time, now = Date.now()) {
  const [date, isToday] = [new Date(time), new Date(time).toDateString() === new Date(now).toDateString()];
  if (isToday) return date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const isRecent = now - time < 300 * DAY_MS;
  return date.toLocaleDateString([], { day: "numeric", month: "short", ...(isRecent ? {} : { year: "numeric" }) });
}
