// The list of saved states at the server.

import { ask, download, find, h, offerUndo, tell } from "./dom.mjs";
import { bytes, count } from "./measure.mjs";

export class StatesView {
  #api;
  #chat;
  #on;
  #deleted = new Set(); // by the person; the server hears of it when it is too late for an undo

  /** `on`: `{adopt(state), open(id), find(stateId), failed(error, facts)}`, see app.mjs. */
  constructor(api, chat, on) {
    this.#api = api;
    this.#chat = chat;
    this.#on = on;
    find("states-refresh").addEventListener("click", () => this.refresh());
    find("states-import").addEventListener("click", () => find("states-file").click());
    find("states-file").addEventListener("change", (event) => this.#import(event.target));
  }

  /** Asks the server again. */
  async refresh() {
    try {
      const states = await this.#api.states();
      tell(find("states-error"), null);
      const items = states.filter(({ id }) => !this.#deleted.has(id)).map((state) => this.#item(state));
      find("states").replaceChildren(...(items.length > 0 ? items : [h("li", { class: "hint" }, "None yet.")]));
    } catch (error) {
      find("states").replaceChildren();
      if (error.status === 401 || error.isPassing) this.#on.failed(error, { isNoted: true });
      else tell(find("states-error"), error);
    }
  }

  #item(state) {
    const isCurrent = this.#chat.conversation.stateId === state.id;
    const name = state.name ?? state.id.slice(0, 14);
    const button = (text, action) =>
      h(
        "button",
        { type: "button", class: "quiet", "aria-label": `${text}: ${name}`, onclick: () => this.#attempt(action) },
        text,
      );
    return h(
      "li",
      { class: isCurrent ? "current" : null, "aria-current": isCurrent ? "true" : null },
      h("div", { class: "name", dir: "auto" }, name),
      h("div", { class: "sizes" }, `${count(state.num_tokens)} tokens · ${bytes(state.bytes)}`),
      h(
        "div",
        { class: "row" },
        isCurrent ? null : button("Continue", () => this.#resume(state)),
        button("Fork", async () => {
          if (!isCurrent) await this.#resume(state);
          await this.#chat.fork();
        }),
        button("Export", () => this.#export(state)),
        button("Delete", () => this.#delete(state, name)),
      ),
      state.points.length > 0 ? this.#points(state, isCurrent) : null,
    );
  }

  #points(state, isCurrent) {
    const rewind = (point) => async () => {
      if (!isCurrent) await this.#resume(state);
      await this.#chat.change(() => this.#chat.conversation.rewind(point.name));
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

  /** Shows the conversation that goes by this state; one of numbers alone, where its text is not in this browser. */
  async #resume(state) {
    const talk = await this.#on.find(state.id);
    if (talk === null) await this.#on.adopt(state);
    else await this.#on.open(talk.id);
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
    download(`${state.name ?? state.id}.safetensors`, await this.#api.exportState(state.id), "application/octet-stream");
  }

  async #delete(state, name) {
    this.#deleted.add(state.id);
    await this.refresh();
    const undo = () => {
      this.#deleted.delete(state.id);
      this.refresh();
    };
    offerUndo(`State “${name}” is deleted.`, undo, async () => {
      await this.#attempt(() => this.#api.deleteState(state.id));
      if (this.#chat.conversation.stateId === state.id) await this.#chat.change(() => this.#chat.conversation.refreshState());
      else await this.refresh();
    });
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    if (file === undefined) return;
    const value = file.name.replace(/\.safetensors$/, "");
    const hint = "It must come from a server of the same model.";
    const name = await ask({ title: "Import a state", label: "Name", hint, value, ok: "Import" });
    if (name === null) return;
    await this.#attempt(async () => this.#on.adopt(await this.#api.importState(file, name)));
  }
}
