// The list of saved conversations.

import { ask, find, h, tell } from "./dom.mjs";
import { bytes, count } from "./measure.mjs";

export class StatesView {
  #api;
  #conversation;
  #chat;
  #transcripts;

  constructor(api, conversation, transcripts) {
    this.#api = api;
    this.#conversation = conversation;
    this.#transcripts = transcripts;
    find("states-refresh").addEventListener("click", () => this.refresh());
    find("states-import").addEventListener("click", () => find("states-file").click());
    find("states-file").addEventListener("change", (event) => this.#import(event.target));
  }

  set chat(chat) {
    this.#chat = chat;
  }

  /** Asks the server again. */
  async refresh() {
    try {
      const states = await this.#api.states();
      tell(find("states-error"), null);
      const items = states.map((state) => this.#item(state));
      find("states").replaceChildren(...(items.length > 0 ? items : [h("li", { class: "hint" }, "None yet.")]));
    } catch (error) {
      find("states").replaceChildren();
      tell(find("states-error"), error);
    }
  }

  #item(state) {
    const isCurrent = this.#conversation.state?.id === state.id;
    const name = state.name ?? state.id.slice(0, 14);
    const button = (text, action) =>
      h("button", { type: "button", class: "quiet", "aria-label": `${text}: ${name}`, onclick: action }, text);
    const resumed = () => this.#chat.change(() => this.#conversation.resume(state));
    return h(
      "li",
      { class: isCurrent ? "current" : null, "aria-current": isCurrent ? "true" : null },
      h("div", { class: "name" }, name),
      h("div", { class: "sizes" }, `${count(state.num_tokens)} tokens · ${bytes(state.bytes)}`),
      h(
        "div",
        { class: "row" },
        isCurrent ? null : button("Continue", resumed),
        button("Fork", async () => {
          if (!isCurrent) await resumed();
          await this.#chat.fork();
        }),
        button("Export", () => this.#attempt(() => this.#export(state))),
        button("Delete", () => this.#attempt(() => this.#delete(state))),
      ),
      state.points.length > 0 ? this.#points(state, isCurrent) : null,
    );
  }

  #points(state, isCurrent) {
    const rewind = (point) => async () => {
      await this.#chat.change(async () => {
        if (!isCurrent) this.#conversation.resume(state);
        await this.#conversation.rewind(point.name);
      });
    };
    const buttons = state.points.map((point) =>
      h(
        "button",
        { type: "button", class: "quiet", "aria-label": `Rewind to ${point.name}`, onclick: rewind(point) },
        `${point.name} (${count(point.num_tokens)})`,
      ),
    );
    return h("div", { class: "points row" }, "Rewind to", ...buttons);
  }

  async #attempt(action) {
    try {
      tell(find("states-error"), null);
      await action();
    } catch (error) {
      tell(find("states-error"), error);
    }
  }

  async #export(state) {
    const url = URL.createObjectURL(await this.#api.exportState(state.id));
    const name = (state.name ?? state.id).replace(/[^\w.-]+/g, "_");
    h("a", { href: url, download: `${name}.safetensors` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  async #delete(state) {
    await this.#api.deleteState(state.id);
    this.#transcripts.delete(state.id);
    if (this.#conversation.state?.id === state.id) await this.#chat.change(() => this.#conversation.reset());
    else await this.refresh();
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    if (file === undefined) return;
    const value = file.name.replace(/\.safetensors$/, "");
    const hint = "It must come from a server of the same model.";
    const name = await ask({ title: "Import a conversation", label: "Name", hint, value, ok: "Import" });
    if (name === null) return;
    await this.#attempt(async () => {
      const state = await this.#api.importState(file, name);
      await this.#chat.change(() => this.#conversation.resume(state));
    });
  }
}
