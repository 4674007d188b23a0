// A text as coloured tokens; what else might have come, and going on from there.

import { find, h, tell } from "./dom.mjs";
import { Stopwatch } from "./measure.mjs";
import { optionsOf } from "./settings.mjs";
import { idsOf, percent, perplexity, SHADES, shadeOf, tokensOf, visible } from "./tokens.mjs";

const NUM_ALTERNATIVES = 6;
const DEFAULT_MAX_TOKENS = 60;

export class TokensView {
  #api;
  #memory;
  #failed;
  #tokens = [];
  #texts = new Map(); // by id
  #ids = null; // what the prompt is made of, until somebody types in it
  #selected = -1;
  #stopping = null;
  #isReady = false;

  /** `failed(error, facts)`: told what went wrong. */
  constructor(api, memory, failed) {
    this.#api = api;
    this.#memory = memory;
    this.#failed = failed;
    find("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!find("complete").disabled) this.#run({});
    });
    find("score").addEventListener("click", () => this.#run({ max_tokens: 0 }));
    find("prompt").addEventListener("input", () => {
      this.#ids = null;
      this.#drawButtons();
    });
    find("token-stop").addEventListener("click", () => this.stop());
    find("tokens").addEventListener("keydown", (event) => this.#move(event));
    find("tokens").addEventListener("focus", () => this.#select(Math.max(0, this.#selected)));
    find("legend").replaceChildren("Probability of each token:", ...swatches());
    this.#drawButtons();
  }

  /** Whether the server takes texts. */
  set isReady(isReady) {
    this.#isReady = isReady;
    this.#drawButtons();
  }

  stop() {
    this.#stopping?.abort();
  }

  /** Continues the text; its own tokens are rated too. */
  async #run(more) {
    const prompt = this.#ids ?? find("prompt").value;
    if (prompt.length === 0 || this.#stopping !== null) return;
    this.#stopping = new AbortController();
    this.#drawButtons();
    const watch = new Stopwatch();
    try {
      tell(find("token-error"), null);
      const options = { max_tokens: DEFAULT_MAX_TOKENS, ...optionsOf(find("settings")), ...more };
      const body = { ...options, prompt, echo: true, logprobs: NUM_ALTERNATIVES, return_tokens_as_token_ids: true };
      await this.#follow(this.#api.complete(body, this.#stopping.signal), watch);
    } catch (error) {
      if (error.name !== "AbortError") this.#tell(error);
    }
    this.#stopping = null;
    this.#drawButtons();
  }

  async #follow(chunks, watch) {
    this.#tokens = [];
    this.#selected = -1;
    find("tokens").replaceChildren();
    find("details").replaceChildren();
    for await (const chunk of chunks) {
      watch.take(chunk.usage?.completion_tokens ?? 0);
      const { usage } = chunk;
      if (usage) this.#memory.tokens = usage.total_tokens;
      this.#memory.show({ first: watch.firstMs, rate: watch.rate, cached: usage?.prompt_tokens_details?.cached_tokens });
      const numPrompt = chunk.usage?.prompt_tokens ?? 0;
      const tokens = tokensOf(chunk.choices[0]?.logprobs);
      await this.#learn(tokens);
      for (const token of tokens) this.#add(token, numPrompt);
      this.#facts();
    }
  }

  async #learn(tokens) {
    const unknown = idsOf(tokens).filter((id) => !this.#texts.has(id));
    if (unknown.length === 0) return;
    const { token_texts: texts } = await this.#api.textOf(unknown);
    unknown.forEach((id, number) => this.#texts.set(id, texts[number]));
  }

  #tell(error) {
    this.#failed(error, { isNoted: true });
    tell(find("token-error"), error);
  }

  #text(token) {
    return this.#texts.get(token.id);
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
        "aria-label": `${visible(this.#text(token))}, ${percent(token.logprob)}`,
        onclick: () => this.#select(number),
        onmouseenter: () => this.#select(number),
      },
      this.#text(token).replace(/\n/g, "⏎\n"),
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
    return (token?.alternatives ?? []).filter((other) => other.id !== token.id);
  }

  /** Continues with another token in the place of this one, by ids: the text might be cut otherwise. */
  async #branch(number, other) {
    if (other === undefined || this.#stopping !== null || !this.#isReady) return;
    const ids = [...this.#tokens.slice(0, number).map((token) => token.id), other.id];
    try {
      find("prompt").value = (await this.#api.textOf(ids)).prompt;
      this.#ids = ids;
      await this.#run({});
    } catch (error) {
      this.#tell(error);
    }
  }

  #table(number) {
    const token = this.#tokens[number];
    if (token.logprob === null) return h("p", { class: "hint" }, "The first token of a text: nothing comes before it.");
    const rows = token.alternatives.map((other) => {
      const isTaken = other.id === token.id;
      const words = visible(this.#text(other));
      const action = isTaken ? {} : { onclick: () => this.#branch(number, other) };
      const label = isTaken ? "the token itself" : "continue with this one";
      const name = h(
        "button",
        { type: "button", disabled: isTaken, "aria-label": `${words}: ${label}`, title: `id ${other.id}`, ...action },
        words,
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
    const caption = `Token ${number + 1}: ${visible(this.#text(token))}, id ${token.id}. A click on another one continues with it.`;
    return h("table", {}, h("caption", {}, caption), h("tbody", {}, ...rows));
  }

  #drawButtons() {
    const isBusy = this.#stopping !== null;
    find("complete").disabled = find("score").disabled = isBusy || !this.#isReady || find("prompt").value === "";
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
