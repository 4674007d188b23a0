// The conversation on the page.

import { ask, find, h, tell } from "./dom.mjs";
import { render } from "./markdown.mjs";
import { bytes, count, Stopwatch } from "./measure.mjs";
import { optionsOf } from "./settings.mjs";

const EXAMPLES = ["Explain linear attention in two sentences.", "Write a haiku about memory.", "What is 17 + 25?"];

export class ChatView {
  #conversation;
  #memory;
  #onChange;
  #stopping = null;
  #frame = 0;
  #articles = new Map();
  #numTokens = 0;

  /** `onChange`: called when saved states may have changed. */
  constructor(conversation, memory, onChange) {
    this.#conversation = conversation;
    this.#memory = memory;
    this.#onChange = onChange;
    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    find("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    find("stop").addEventListener("click", () => this.stop());
    find("system").addEventListener("change", () => (conversation.system = find("system").value.trim()));
    this.draw();
  }

  get isBusy() {
    return this.#stopping !== null;
  }

  stop() {
    this.#stopping?.abort();
  }

  /** This conversation's memory, after something else was shown. */
  showMemory() {
    this.#memory.tokens = this.#numTokens;
  }

  /** Everything anew, after another conversation was taken up. */
  draw() {
    const { turns, state, hasUnknownPast } = this.#conversation;
    this.#articles.clear();
    find("system").value = this.#conversation.system;
    const log = find("log");
    if (turns.length > 0) log.replaceChildren(...turns.map((turn) => this.#article(turn)));
    else log.replaceChildren(hasUnknownPast ? unknownPast(state) : this.#welcome());
    log.scrollTop = log.scrollHeight;
    this.#drawPlace();
  }

  /** Runs something that changes the conversation; what goes wrong is told. */
  async change(action) {
    if (this.isBusy) return;
    try {
      tell(find("chat-error"), null);
      await action();
      this.draw();
      this.#numTokens = this.#conversation.state?.num_tokens ?? (this.#conversation.turns.length ? this.#numTokens : 0);
      this.showMemory();
      await this.#onChange();
    } catch (error) {
      tell(find("chat-error"), error);
    }
  }

  async #send() {
    const question = find("question");
    const text = question.value.trim();
    if (text === "" || this.isBusy) return;
    this.#stopping = new AbortController();
    this.#busy(true);
    const watch = new Stopwatch();
    try {
      tell(find("chat-error"), null);
      this.#conversation.system = find("system").value.trim();
      question.value = "";
      await this.#answer(text, optionsOf(find("settings")), watch);
    } catch (error) {
      if (error.name !== "AbortError") {
        tell(find("chat-error"), error);
        question.value = text;
      }
    }
    this.#stopping = null;
    this.#busy(false);
    cancelAnimationFrame(this.#frame);
    this.draw();
    // A state knows best how long it is: what was stopped is no part of it.
    if (this.#conversation.state !== null) this.#numTokens = this.#conversation.state.num_tokens;
    this.showMemory();
    question.focus();
    await this.#onChange();
  }

  async #answer(text, options, watch) {
    const answers = this.#conversation.say(text, options, this.#stopping.signal);
    let isFirst = true;
    for await (const { turn, usage } of answers) {
      if (isFirst) this.draw();
      isFirst = false;
      watch.take(usage?.completion_tokens ?? 0);
      this.#numTokens = usage?.total_tokens ?? this.#numTokens;
      this.#later(() => {
        this.#fill(turn, true);
        this.#memory.show(usage, watch);
      });
    }
  }

  /** At the next frame, so that fast answers do not draw more often than is seen. */
  #later(work) {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => {
      const log = find("log");
      const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      work();
      if (isAtEnd) log.scrollTop = log.scrollHeight;
    });
    this.#pending = work;
  }

  #pending = null;

  #busy(isBusy) {
    find("send").hidden = isBusy;
    find("stop").hidden = !isBusy;
    if (!isBusy) this.#pending?.();
    this.#pending = null;
  }

  #article(turn) {
    const article = h("article", { class: `turn ${turn.role}${turn.unsaved ? " unsaved" : ""}` });
    this.#articles.set(turn, article);
    this.#fill(turn, false);
    return article;
  }

  #fill(turn, isGrowing) {
    const article = this.#articles.get(turn);
    if (article === undefined) return;
    const isOpen = article.querySelector("details")?.open ?? isGrowing;
    const said = h("div", { class: "said" });
    said.append(turn.role === "user" ? turn.text : render(turn.text, document));
    article.setAttribute("aria-busy", String(isGrowing));
    article.replaceChildren(
      h("h3", { class: "who" }, turn.role === "user" ? "You" : "Model"),
      ...(turn.thought ? [thought(turn, isOpen)] : []),
      said,
      ...notes(turn).map((note) => h("p", { class: "note" }, note)),
    );
  }

  #drawPlace() {
    const { state, turns } = this.#conversation;
    const button = (name, action) => h("button", { type: "button", class: "quiet", onclick: action }, name);
    const place = find("place");
    if (state === null) {
      place.replaceChildren(
        h("span", { class: "spread" }, "In this tab alone; every message sends all of it."),
        button("Save", () => this.#save()),
        ...(turns.length > 0 ? [button("New", () => this.change(() => this.#conversation.reset()))] : []),
      );
      return;
    }
    place.replaceChildren(
      h(
        "span",
        { class: "spread" },
        "Saved as ",
        h("strong", {}, state.name ?? state.id.slice(0, 14)),
        `: ${count(state.num_tokens)} tokens in ${bytes(state.bytes)}; each message sends only itself.`,
      ),
      button("Mark this point", () => this.#mark()),
      button("Fork", () => this.fork()),
      button("New", () => this.change(() => this.#conversation.reset())),
    );
  }

  async #save() {
    const name = await ask({ title: "Save this conversation", label: "Name", hint: "A name is optional.", ok: "Save" });
    if (name !== null) await this.change(() => this.#conversation.save(name));
  }

  async #mark() {
    const name = await ask({ title: "Name this point", label: "Name", hint: "You can rewind to it later.", ok: "Mark" });
    if (name) await this.change(() => this.#conversation.mark(name));
  }

  /** Goes on in a copy of the saved conversation. */
  async fork(point) {
    const hint = "The other one stays as it is.";
    const name = await ask({ title: "Fork this conversation", label: "Name of the copy", hint, ok: "Fork" });
    if (name !== null) await this.change(() => this.#conversation.fork(name, point));
  }

  #welcome() {
    const use = (text) => {
      find("question").value = text;
      this.#send();
    };
    const examples = EXAMPLES.map((text) =>
      h("button", { type: "button", class: "quiet", onclick: () => use(text) }, text),
    );
    return h(
      "div",
      { class: "welcome" },
      h("h2", {}, "A conversation of constant size"),
      h("p", {}, "This model remembers in a state that does not grow. Save it, fork it, go back in it, take it with you."),
      h("div", { class: "row" }, ...examples),
    );
  }
}

function unknownPast(state) {
  return h(
    "div",
    { class: "welcome" },
    h("h2", {}, `${count(state.num_tokens)} tokens are remembered`),
    h("p", {}, "They are in the state, as numbers. Their text is not: it was said elsewhere. Just go on."),
  );
}

function thought(turn, isOpen) {
  const summary = turn.text === "" ? "Thinking …" : "Thought";
  return h("details", { class: "thought", open: isOpen }, h("summary", {}, summary), h("div", {}, turn.thought));
}

function notes(turn) {
  const found = [];
  if (turn.role === "user") return found;
  if (turn.unsaved) found.push("Stopped: the saved conversation has not seen this.");
  else if (turn.stopped) found.push("Stopped.");
  if (turn.finish === "length") found.push("Cut off at the limit of tokens.");
  return found;
}
