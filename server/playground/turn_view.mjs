// One message or answer on the page, with what can be done with it.

import { copyButton, h } from "./dom.mjs";
import { count, duration } from "./measure.mjs";
import { RichText } from "./rich.mjs";

export class TurnView {
  element;
  #said;
  #does;
  #editor = null;
  #draft;
  #hadThought = false;

  /**
   * `does`: `{regenerate, edit, continue, retry, show, draft}`, each called with a turn; `draft`: what the message was being
   * changed to, and is no longer sent nor left; `render`: see `RichText`.
   */
  constructor(turn, does, render, draft = "") {
    this.#does = does;
    this.#draft = draft;
    this.#said = turn.role === "user" ? null : new RichText(render);
    this.element = h("article", { class: `turn ${turn.role}`, "data-turn": turn.id });
  }

  /** `facts`: `{end, siblings, isBusy, canContinue, canBranch, canSay}`. */
  draw(turn, facts) {
    if (this.#editor !== null) return;
    if (this.#draft !== "" && facts.canBranch) return this.#edit(turn);
    this.element.setAttribute("aria-busy", String(facts.end === null));
    const focused = this.element.contains(document.activeElement) ? document.activeElement.textContent : null;
    this.element.replaceChildren(
      this.#head(turn, facts),
      ...(turn.thought ? [this.#thought(turn, facts)] : []),
      this.#saying(turn),
      ...notes(turn, facts).map((note) => h("p", { class: "note" }, note)),
      this.#foot(turn, facts),
    );
    if (focused !== null) [...this.element.querySelectorAll("button")].find((one) => one.textContent === focused)?.focus();
  }

  /** Only what grows. */
  grow(turn) {
    const had = this.#hadThought;
    if (turn.thought && !had) return false;
    if (turn.thought) this.element.querySelector(".thought div").textContent = turn.thought;
    this.#said.show(turn.text);
    return true;
  }

  #head(turn, { siblings, isBusy }) {
    const who = h("h3", { class: "who" }, turn.role === "user" ? "You" : "Model");
    if (siblings.length < 2) return h("div", { class: "head" }, who);
    const number = siblings.findIndex((other) => other.id === turn.id);
    const step = (label, sign, other) => {
      const action = () => this.#does.show(other);
      return h("button", { type: "button", class: "quiet icon", "aria-label": label, disabled: isBusy || !other, onclick: action }, sign);
    };
    return h(
      "div",
      { class: "head" },
      who,
      step("Previous version", "‹", siblings[number - 1]),
      h("span", { class: "versions" }, `${number + 1} / ${siblings.length}`),
      step("Next version", "›", siblings[number + 1]),
    );
  }

  #saying(turn) {
    if (this.#said === null) return h("div", { class: "said", dir: "auto" }, turn.text);
    this.#said.show(turn.text);
    return this.#said.element;
  }

  #thought(turn, { end }) {
    this.#hadThought = true;
    const isOpen = this.element.querySelector(".thought")?.open ?? end === null;
    const summary = turn.text === "" && end === null ? "Thinking …" : "Thought";
    return h("details", { class: "thought", open: isOpen }, h("summary", {}, summary), h("div", { dir: "auto" }, turn.thought));
  }

  #foot(turn, facts) {
    const button = (name, isOn, action, style = "quiet") =>
      h("button", { type: "button", class: style, disabled: !isOn || facts.isBusy, onclick: () => action(turn) }, name);
    if (turn.role === "user") {
      const edit = button("Edit", facts.canBranch, () => this.#edit(turn));
      return h("div", { class: "foot" }, copyButton("Copy", () => turn.text), edit);
    }
    if (facts.end === null) return h("div", { class: "foot" });
    const isEmpty = turn.text === "" && turn.resume === undefined;
    const copying = copyButton("Copy", () => turn.text);
    copying.disabled = turn.text === "";
    return h(
      "div",
      { class: "foot" },
      ...(facts.end !== "stop" && !isEmpty ? [button("Continue", facts.canContinue, this.#does.continue, "quiet strong")] : []),
      copying,
      isEmpty
        ? button("Try again", facts.canBranch && facts.canSay, this.#does.retry, "quiet strong")
        : button("Regenerate", facts.canBranch && facts.canSay, this.#does.regenerate),
      h("span", { class: "stats" }, stats(turn)),
    );
  }

  #edit(turn) {
    const field = h("textarea", { rows: "3", "aria-label": "Edit this message", dir: "auto" });
    field.value = this.#draft || turn.text;
    const isNew = this.#draft === "";
    const keep = (text) => this.#does.draft(turn, (this.#draft = text));
    field.addEventListener("input", () => keep(field.value));
    const end = (text) => {
      this.#editor = null;
      keep("");
      if (text !== null && text.trim() !== "" && text !== turn.text) this.#does.edit(turn, text.trim());
      else this.#does.redraw();
    };
    const editor = h(
      "form",
      { class: "editor", onsubmit: (event) => (event.preventDefault(), end(field.value)) },
      field,
      h(
        "div",
        { class: "row end" },
        h("button", { type: "button", class: "quiet", onclick: () => end(null) }, "Cancel"),
        h("button", { class: "primary" }, "Send"),
      ),
    );
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") end(null);
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) end(field.value);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.#editor = editor;
    this.element.replaceChildren(h("h3", { class: "who" }, "You"), editor);
    if (isNew) field.focus();
  }
}

function notes(turn, { end }) {
  if (turn.role === "user") return [];
  const reasons = {
    stopped: "Stopped.",
    length: "Cut off at the limit of tokens.",
    cut: "Interrupted: the page was closed before the end.",
    error: turn.resume ? "The server was stopped; it has kept where the answer was." : (turn.error ?? "The answer ended early."),
  };
  return reasons[end] ? [reasons[end]] : [];
}

function stats({ stats: told }) {
  if (!told?.tokens) return "";
  const rate = told.rate === null ? "" : ` · ${told.rate.toFixed(1)} tokens/s`;
  return `${count(told.tokens)} token${told.tokens === 1 ? "" : "s"}${rate} · first after ${duration(told.first)}`;
}
