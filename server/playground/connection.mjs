// Whether the server can be asked: waits while it loads, asks for a key, and comes back after it was away.

import { ask, find } from "./dom.mjs";

const KEY = "dijiang.key"; // in the session's storage: gone with the tab, never in an address
const AGAIN_MS = 1500;

export function storedKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export class Connection {
  #api;
  #on;
  #attempt = null;

  /** `on`: `{ready({model, capacity}), away()}`. */
  constructor(api, on) {
    this.#api = api;
    this.#on = on;
    find("key-open").addEventListener("click", () => this.askForKey());
  }

  /** Tries until the server answers; one attempt at a time. */
  connect() {
    this.#attempt ??= this.#try().finally(() => (this.#attempt = null));
    return this.#attempt;
  }

  /** What an error of a request says about the connection. */
  take(error) {
    if (error.status === 401) this.askForKey({ isRefused: true });
    else if (error.isPassing) this.connect();
  }

  async askForKey({ isRefused = false } = {}) {
    if (find("asker").open) return;
    const hint = "It stays in this tab, and is sent to this server alone. Leave it empty to forget it.";
    const refusal = storedKey() ? "The server does not know this key." : "This server asks for a key.";
    const title = isRefused ? refusal : "API key";
    const key = await ask({ title, label: "API key", hint, value: isRefused ? "" : storedKey(), secret: true, ok: "Use" });
    if (key === null) return;
    if (key === "") sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, key);
    await this.connect();
  }

  async #try() {
    for (;;) {
      try {
        const [models, capacity] = await Promise.all([this.#api.models(), this.#api.capacity()]);
        this.#say(models.data[0].id, "");
        this.#on.ready({ model: models.data[0], capacity });
        return;
      } catch (error) {
        this.#on.away();
        if (error.status === 401) {
          this.#say(storedKey() ? "the key is wrong" : "an API key is needed", "");
          queueMicrotask(() => this.askForKey({ isRefused: true }));
          return;
        }
        const isLoading = error.code === "engine_loading" || error.code === "engine_restarting";
        const words = { draining: "The server is stopping …", engine_loading: "The model is loading …" };
        if (error.status === 0) this.#say("not reachable", "The server cannot be reached. What is here stays here; trying again …");
        else this.#say(isLoading ? "loading …" : "not ready", words[error.code] ?? `${error.message} Trying again …`);
        await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      }
    }
  }

  #say(model, notice) {
    find("model").textContent = model;
    find("waiting").textContent = notice;
    find("waiting").hidden = notice === "";
  }
}
