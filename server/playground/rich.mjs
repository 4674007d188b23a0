// Answers with everything that Markdown has. The server parses it and gives a tree; elements are made here one by one, of
// names and attributes that are known. Text only ever becomes text.

import { copyButton, h } from "./dom.mjs";

const PLAIN = new Set(
  ["p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "thead", "tbody", "tr", "th", "td"].concat(
    ["em", "strong", "s", "br", "code"],
  ),
);
const BLOCKS = new Set(["p", "h3", "h4", "h5", "h6", "li", "blockquote", "th", "td"]);
const KINDS = new Set(["comment", "keyword", "string", "number", "name", "builtin"]);
const SIDES = new Set(["left", "center", "right"]);
const LINK = /^(https?:|mailto:)/i;
/** The server takes no longer text at once. */
const MAX_CHARACTERS = 60_000;
const PAUSE_MS = 120;

/** An element, or a text, of a node of the tree; of what is not known, its children remain. */
export function elementOf(node) {
  if (typeof node === "string") return node;
  const [name, attributes, ...children] = node;
  if (name === "pre") return codeOf(attributes, children);
  const inside = children.map(elementOf);
  if (name === "a" && LINK.test(attributes.href)) {
    return h("a", { href: attributes.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...inside);
  }
  if (name === "math") return h("span", { class: attributes.display ? "math display" : "math", dir: "ltr" }, ...inside);
  if (name === "span" && KINDS.has(attributes.class)) return h("span", { class: `code-${attributes.class}` }, ...inside);
  if (name === "table") return h("div", { class: "scrolls", tabindex: "0", role: "group", "aria-label": "Table" }, h("table", {}, ...inside));
  if (!PLAIN.has(name)) return h("span", {}, ...inside);
  const element = h(name, { dir: BLOCKS.has(name) ? "auto" : null }, ...inside);
  if (name === "ol" && Number.isInteger(attributes.start)) element.start = attributes.start;
  if (SIDES.has(attributes.align)) element.className = `align-${attributes.align}`;
  return element;
}

function codeOf({ language }, children) {
  const code = h("code", {}, ...children.map(elementOf));
  const name = String(language ?? "").slice(0, 30);
  return h(
    "div",
    { class: "block", dir: "ltr" },
    h("div", { class: "block-head" }, h("span", {}, name || "code"), copyButton("Copy code", () => code.textContent.replace(/\n$/, ""))),
    h("pre", { tabindex: "0", "aria-label": name ? `Code, ${name}` : "Code" }, code),
  );
}

/** Does one thing at a time, in order. */
export function inTurn(work) {
  let last = Promise.resolve();
  return (...given) => (last = last.catch(() => {}).then(() => work(...given)));
}

/** A growing text: what is parsed is shown as such, the newest words as they are. */
export class RichText {
  element = h("div", { class: "said" });
  #render;
  #text = "";
  #stable = 0; // characters whose blocks do not change any more
  #shown = 0; // characters that are parsed
  #blocks = []; // of the text behind the stable part
  #tail = h("span", { class: "tail" });
  #isBusy = false;

  /** `render(text)`: a promise of `{blocks, last_line}`; where it fails, the text stays as it is. */
  constructor(render) {
    this.#render = render;
  }

  /** Shows a text; quickest if it is the last one and more. */
  show(text) {
    if (text === this.#text && (this.#isBusy || this.#shown === text.length)) return;
    if (!text.startsWith(this.#text.slice(0, this.#shown))) this.#restart();
    this.#text = text;
    this.#drawTail();
    if (!this.#isBusy) this.#parse();
  }

  #restart() {
    [this.#stable, this.#shown, this.#blocks] = [0, 0, []];
    this.element.replaceChildren();
  }

  #drawTail() {
    const [shown, rest] = [this.#text.slice(0, this.#shown), this.#text.slice(this.#shown)];
    this.#tail.remove();
    this.#tail.textContent = rest;
    if (rest.trim() === "") return;
    const host = /\n\s*\n\s*$/.test(shown) ? null : openIn(this.element.lastElementChild);
    (host ?? this.element).append(this.#tail);
  }

  async #parse() {
    this.#isBusy = true;
    try {
      while (this.#shown < this.#text.length) {
        const [text, begin] = [this.#text, this.#stable];
        const part = text.slice(begin, begin + MAX_CHARACTERS);
        const { blocks, last_line: lastLine } = await this.#render(part);
        if (this.#text.startsWith(text)) this.#take(part, begin, blocks, lastLine);
        if (this.#shown < this.#text.length) await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
      }
    } catch {
      // The text is there, unparsed.
    }
    this.#isBusy = false;
  }

  #take(part, begin, blocks, lastLine) {
    this.#blocks.forEach((block) => block.remove());
    const elements = blocks.map((node) => (typeof node === "string" ? h("p", {}, node) : elementOf(node)));
    this.#tail.remove();
    this.element.append(...elements);
    this.#shown = begin + part.length;
    // The last block may grow, and is parsed again with what follows; not where it fills a part by itself.
    const isFull = part.length === MAX_CHARACTERS && lastLine === 0;
    this.#stable = begin + (isFull ? part.length : offsetOf(part, lastLine));
    this.#blocks = isFull ? [] : elements.slice(-1);
    this.#drawTail();
  }
}

/** Where the words behind an element belong until they are parsed; null: below it. */
function openIn(element) {
  if (element === null || element.matches("p, h3, h4, h5, h6, code")) return element;
  if (element.matches("li") && !element.lastElementChild?.matches("p, ul, ol, .block")) return element;
  return element.matches("ul, ol, li, blockquote, .block, pre") ? openIn(element.lastElementChild) : null;
}

function offsetOf(text, line) {
  let at = 0;
  for (let number = 0; number < line; number++) at = text.indexOf("\n", at) + 1;
  return at;
}
