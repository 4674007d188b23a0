// Sampling settings: only those that are filled in are sent, the others are the model's own. They are remembered.

import { find } from "./dom.mjs";

const REMEMBERED = "sampling";

export function optionsOf(form) {
  const options = {};
  for (const input of form.querySelectorAll("input[name]")) {
    if (input.value.trim() === "" && !input.validity.badInput) continue;
    if (!input.checkValidity()) throw new Error(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`);
    options[input.name] = Number(input.value);
  }
  return options;
}

export class Settings {
  #form = find("settings");
  #store;

  constructor(store) {
    this.#store = store;
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#form.addEventListener("input", () => this.#changed());
    find("settings-reset").addEventListener("click", () => {
      for (const input of this.#inputs) input.value = "";
      this.#changed();
    });
  }

  /** Fills in what was set last. */
  async load() {
    const remembered = (await this.#store.setting(REMEMBERED)) ?? {};
    for (const input of this.#inputs) input.value = remembered[input.name] ?? "";
    this.#draw();
  }

  /** `sampling`: what the model does where nothing is set. */
  set defaults(sampling) {
    for (const input of this.#inputs) {
      const value = sampling[input.name];
      if (value !== undefined) input.placeholder = input.name === "top_k" && value === 0 ? "all" : String(value);
    }
  }

  get #inputs() {
    return this.#form.querySelectorAll("input[name]");
  }

  #changed() {
    this.#draw();
    const filled = [...this.#inputs].filter((input) => input.value !== "").map((input) => [input.name, input.value]);
    this.#store.setSetting(REMEMBERED, Object.fromEntries(filled)).catch(() => {}); // remembered as long as the page
  }

  #draw() {
    find("settings-reset").disabled = [...this.#inputs].every((input) => input.value === "");
  }
}
