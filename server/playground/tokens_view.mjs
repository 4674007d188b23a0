// A text as coloured tokens; what else might have come, and going on from there.

import { find, h, tell } from "./dom.mjs";
import { Stopwatch } from "./measure.mjs";
import { optionsOf } from "./settings.mjs";
import { percent, perplexity, SHADES, shadeOf, tokensOf, visible } from "./tokens.mjs";

const NUM_ALTERNATIVES = 6;
const DEFAULT_MAX_TOKENS = 60;

export class TokensView {
  #api;
  #memory;
  #tokens = [];
  #selected = -1;
  #stopping = null;

  constructor(api, memory) {
    this.#api = api;
    this.#memory = memory;
    find("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run(find("prompt").value, {});
    });
    find("score").addEventListener("click", () => this.#run(find("prompt").value, { max_tokens: 0 }));
    find("token-stop").addEventListener("click", () => this.stop());
    find("tokens").addEventListener("keydown", (event) => this.#move(event));
    find("tokens").addEventListener("focus", () => this.#select(Math.max(0, this.#selected)));
    find("legend").replaceChildren("Probability of each token:", ...swatches());
  }

  stop() {
    this.#stopping?.abort();
  }

  /** Goes on from a text; its own tokens are rated too. */
  async #run(prompt, more) {
    if (prompt === "" || this.#stopping !== null) return;
    this.#stopping = new AbortController();
    this.#busy(true);
    const watch = new Stopwatch();
    try {
      tell(find("token-error"), null);
      const options = { max_tokens: DEFAULT_MAX_TOKENS, ...optionsOf(find("settings")), ...more };
      const body = { ...options, prompt, echo: true, logprobs: NUM_ALTERNATIVES };
      await this.#follow(this.#api.complete(body, this.#stopping.signal), watch);
    } catch (error) {
      if (error.name !== "AbortError") tell(find("token-error"), error);
    }
    this.#stopping = null;
    this.#busy(false);
  }

  async #follow(chunks, watch) {
    this.#tokens = [];
    this.#selected = -1;
    find("tokens").replaceChildren();
    find("details").replaceChildren();
    for await (const chunk of chunks) {
      watch.take(chunk.usage?.completion_tokens ?? 0);
      this.#memory.show(chunk.usage, watch);
      const numPrompt = chunk.usage?.prompt_tokens ?? 0;
      for (const token of tokensOf(chunk.choices[0]?.logprobs)) this.#add(token, numPrompt);
      this.#facts();
    }
  }

  #add(token, numPrompt) {
    const number = this.#tokens.push(token) - 1;
    const shade = shadeOf(token.logprob);
    const classes = ["token", shade === null ? "" : `shade-${shade}`, number < numPrompt ? "prompt" : ""];
    const element = h(
      "span",
      {
        class: classes.filter(Boolean).join(" "),
        id: `token-${number}`,
        role: "option",
        "aria-selected": "false",
        "aria-label": `${visible(token.text)}, ${percent(token.logprob)}`,
        onclick: () => this.#select(number),
        onmouseenter: () => this.#select(number),
      },
      token.text.replace(/\n/g, "⏎\n"),
    );
    find("tokens").append(element);
  }

  #facts() {
    const value = perplexity(this.#tokens);
    const words = value === null ? "" : ` · perplexity ${value.toFixed(2)}`;
    find("token-facts").textContent = `${this.#tokens.length} tokens${words}`;
  }

  #select(number) {
    if (number < 0 || number >= this.#tokens.length) return;
    find(`token-${this.#selected}`)?.setAttribute("aria-selected", "false");
    this.#selected = number;
    const element = find(`token-${number}`);
    element.setAttribute("aria-selected", "true");
    element.scrollIntoView({ block: "nearest" });
    find("tokens").setAttribute("aria-activedescendant", element.id);
    find("details").replaceChildren(this.#table(number));
  }

  #move(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Enter") this.#branch(this.#selected, this.#others(this.#selected)[0]);
    else if (!(event.key in steps)) return;
    else this.#select(Math.max(0, Math.min(this.#tokens.length - 1, this.#selected + steps[event.key])));
    event.preventDefault();
  }

  #others(number) {
    const token = this.#tokens[number];
    return (token?.alternatives ?? []).filter((other) => other.text !== token.text);
  }

  /** Goes on with another token in the place of this one. */
  #branch(number, other) {
    if (other === undefined) return;
    const before = this.#tokens.slice(0, number).map((token) => token.text);
    const prompt = [...before, other.text].join("");
    find("prompt").value = prompt;
    this.#run(prompt, {});
  }

  #table(number) {
    const token = this.#tokens[number];
    if (token.logprob === null) return h("p", { class: "hint" }, "The first token of a text: nothing comes before it.");
    const rows = token.alternatives.map((other) => {
      const isTaken = other.text === token.text;
      const action = isTaken ? {} : { onclick: () => this.#branch(number, other) };
      const label = isTaken ? "the token itself" : "go on with this one";
      const name = h(
        "button",
        { type: "button", disabled: isTaken, "aria-label": `${visible(other.text)}: ${label}`, ...action },
        visible(other.text),
      );
      const bar = h("div", { class: "bar", "aria-hidden": "true" });
      bar.style.setProperty("--part", Math.exp(other.logprob));
      return h(
        "tr",
        { class: isTaken ? "taken" : null },
        h("th", { scope: "row" }, name),
        h("td", { class: "number" }, percent(other.logprob)),
        h("td", { class: "wide" }, bar),
      );
    });
    const caption = `Token ${number + 1}: ${visible(token.text)}. A click on another one goes on with it.`;
    return h("table", {}, h("caption", {}, caption), h("tbody", {}, ...rows));
  }

  #busy(isBusy) {
    find("complete").disabled = find("score").disabled = isBusy;
    find("token-stop").hidden = !isBusy;
  }
}

function swatches() {
  const bounds = [1, ...SHADES, 0].map((value) => `${100 * value}`);
  return bounds.slice(1).map((low, shade) => {
    const words = shade === SHADES.length ? `under ${bounds[shade]} %` : `over ${low} %`;
    return h("span", { class: `swatch shade-${shade}` }, words);
  });
}
