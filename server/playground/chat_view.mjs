// The conversation on the page.

import { ask, find, h, tell } from "./dom.mjs";
import { editing, NEW } from "./drafts.mjs";
import { bytes, count } from "./measure.mjs";
import { optionsOf } from "./settings.mjs";
import { TurnView } from "./turn_view.mjs";

const EXAMPLES = ["Explain linear attention in two sentences.", "Write a haiku about memory.", "What is 17 + 25?"];
const LOOK_AGAIN_MS = 2000;

/**
 * Shows one conversation. Answers that grow in others go on: `open` is given what runs, by the id of the conversation, and
 * comes back to it.
 */
export class ChatView {
  #conversation;
  #drafts;
  #memory;
  #render;
  #on;
  #running = new Map();
  #views = new Map();
  #frame = 0;
  #looking = 0;
  #isReady = false;

  /**
   * `on`: `{changed(), failed(error, {isNoted}), started(), forked(id)}`: states may have changed; something went wrong, and
   * the answer says so already; an answer has begun; there is a copy.
   */
  constructor({ drafts, memory, render, on }) {
    this.#drafts = drafts;
    this.#memory = memory;
    this.#render = render;
    this.#on = on;
    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    find("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    find("question").addEventListener("input", () => {
      if (this.#conversation === undefined) return; // `open` takes it
      this.#drawComposer();
      this.#drafts.keep(this.#draftPlace, find("question").value);
    });
    find("stop").addEventListener("click", () => this.stop());
    stayAtEnd(find("log"));
    find("system").addEventListener("input", () => this.#conversation?.setSystem(find("system").value.trim()));
  }

  get conversation() {
    return this.#conversation;
  }

  get isBusy() {
    return this.#running.has(this.#conversation.record.id);
  }

  /** Whether the server takes messages. */
  set isReady(isReady) {
    this.#isReady = isReady;
    if (this.#conversation) this.draw();
  }

  /** One that an answer is being written in; undefined: none of this id. */
  running(id) {
    return this.#running.get(id)?.conversation;
  }

  /** Shows another conversation. */
  open(conversation) {
    const early = this.#conversation === undefined ? find("question").value : ""; // typed before this program ran
    this.#conversation = conversation;
    this.#views.clear();
    find("log").replaceChildren();
    if (early) this.#drafts.keep(this.#draftPlace, early);
    find("question").value = early || this.#drafts.of(this.#draftPlace);
    find("system").value = conversation.record.system;
    tell(find("chat-error"), null);
    this.draw();
    toEnd(find("log"));
    this.showMemory();
  }

  stop() {
    this.#running.get(this.#conversation.record.id)?.stopping.abort();
  }

  /** This conversation's memory, after something else was shown. */
  showMemory() {
    const { state, path } = this.#conversation;
    this.#memory.tokens = state?.num_tokens || (path.findLast((turn) => turn.total)?.total ?? 0);
    this.#memory.show(path.findLast((turn) => turn.stats)?.stats ?? null);
  }

  draw() {
    const { path, state, record } = this.#conversation;
    const log = find("log");
    if (path.length > 0) {
      const shown = path.map((turn) => this.#drawn(turn));
      // What stands where it should is not moved, so that it keeps its focus.
      if (shown.length !== log.children.length || shown.some((one, number) => one !== log.children[number])) {
        log.replaceChildren(...shown);
      }
    } else log.replaceChildren(record.isPartial && state ? unknownPast(state) : this.#welcome());
    document.title = record.title ? `${record.title} · DiJiang` : "DiJiang playground";
    this.#drawPlace();
    this.#drawComposer();
    this.#lookAgain();
  }

  /** An answer that another tab writes: it goes on there, or that tab is gone. */
  #lookAgain() {
    clearTimeout(this.#looking);
    const { path } = this.#conversation;
    if (this.isBusy || path.length === 0 || this.#conversation.endOf(path.at(-1)) !== null) return;
    this.#looking = setTimeout(async () => {
      await this.#conversation.reread();
      this.draw();
    }, LOOK_AGAIN_MS);
  }

  /** Runs something that changes the conversation; what goes wrong is told. */
  async change(action) {
    if (this.isBusy) return;
    try {
      tell(find("chat-error"), null);
      await action();
      this.draw();
      this.showMemory();
      await this.#on.changed();
    } catch (error) {
      this.#on.failed(error, { isNoted: false });
    }
  }

  /** The settings; null: one is wrong, and the page says which. */
  #options() {
    try {
      tell(find("chat-error"), null);
      return optionsOf(find("settings"));
    } catch (error) {
      tell(find("chat-error"), error);
      return null;
    }
  }

  get #draftPlace() {
    const { record, turns } = this.#conversation;
    return turns.size > 0 || record.isPartial ? record.id : NEW;
  }

  #send() {
    const text = find("question").value.trim();
    if (text === "" || find("send").disabled || this.isBusy || this.#options() === null) return;
    this.#drafts.keep(this.#draftPlace, "");
    find("question").value = "";
    this.#run((talk, options, signal) => talk.say(text, options, signal));
    toEnd(find("log"));
  }

  /** Follows an answer to its end, whatever is shown meanwhile. */
  async #run(begin) {
    const [conversation, stopping, options] = [this.#conversation, new AbortController(), this.#options()];
    if (options === null || this.isBusy) return;
    const isShown = () => this.#conversation === conversation;
    this.#running.set(conversation.record.id, { conversation, stopping });
    let isFirst = true;
    try {
      await conversation.setSystem(find("system").value.trim());
      for await (const step of begin(conversation, options, stopping.signal)) {
        if (isFirst) {
          this.#on.started(conversation);
          if (isShown()) this.draw();
        }
        isFirst = false;
        if (isShown()) this.#later(step);
      }
    } catch (error) {
      if (error.name !== "AbortError") this.#on.failed(error, { isNoted: !isFirst });
    }
    this.#running.delete(conversation.record.id);
    cancelAnimationFrame(this.#frame);
    if (isShown()) {
      this.draw();
      this.showMemory();
      if (document.activeElement === document.body) find("question").focus();
    }
    await this.#on.changed();
  }

  /** At the next frame, so that fast answers do not draw more often than is seen. */
  #later({ turn }) {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => {
      if (!this.#views.get(turn.id)?.grow(turn)) this.draw();
      this.#memory.show(turn.stats);
      if (turn.total) this.#memory.tokens = turn.total;
    });
  }

  #drawn(turn) {
    const talk = this.#conversation;
    if (!this.#views.has(turn.id)) {
      const draft = turn.role === "user" ? this.#drafts.of(editing(turn)) : "";
      this.#views.set(turn.id, new TurnView(turn, this.#does, this.#render, draft));
    }
    const view = this.#views.get(turn.id);
    view.draw(turn, {
      end: talk.endOf(turn),
      siblings: talk.siblings(turn),
      isBusy: this.isBusy,
      canContinue: talk.canContinue(turn) && this.#isReady,
      canBranch: talk.canBranch(turn) && this.#isReady,
      canSay: this.#isReady,
    });
    return view.element;
  }

  #does = {
    regenerate: (turn) => this.#run((talk, options, signal) => talk.regenerate(turn, options, signal)),
    continue: (turn) => this.#run((talk, options, signal) => talk.continue(turn, options, signal)),
    retry: (turn) => this.#run((talk, options, signal) => talk.retry(turn, options, signal)),
    edit: (turn, text) => this.#run((talk, options, signal) => talk.edit(turn, text, options, signal)),
    show: (turn) => this.change(() => this.#conversation.show(turn)),
    draft: (turn, text) => this.#drafts.keep(editing(turn), text),
    redraw: () => this.draw(),
  };

  #drawComposer() {
    const isBusy = this.isBusy;
    find("send").hidden = isBusy;
    find("stop").hidden = !isBusy;
    const canSay = this.#isReady && this.#conversation.canSay;
    find("send").disabled = !canSay || find("question").value.trim() === "";
  }

  #drawPlace() {
    const { state, path, record, canSay } = this.#conversation;
    const isOff = this.isBusy || !this.#isReady;
    const button = (name, action, isPossible = true) =>
      h("button", { type: "button", class: "quiet", onclick: action, disabled: isOff || !isPossible }, name);
    const place = find("place");
    if (state === null) {
      const words = canSay
        ? "Kept in this browser; every message sends all of it."
        : "The state that knows the beginning is on another branch.";
      const hasWords = path.length > 0 || record.system !== "";
      place.replaceChildren(h("span", { class: "spread" }, words), button("Save as state", () => this.#save(), hasWords && canSay));
      return;
    }
    place.replaceChildren(
      h(
        "span",
        { class: "spread" },
        "State ",
        h("strong", {}, state.name ?? state.id.slice(0, 14)),
        `: ${count(state.num_tokens)} tokens in ${bytes(state.bytes)}; each message sends only itself.`,
      ),
      button("Mark this point", () => this.#mark()),
      button("Fork", () => this.fork()),
    );
  }

  async #save() {
    const hint = "The server keeps it as a state; the text stays in this browser. A name is optional.";
    const name = await ask({ title: "Save as a state", label: "Name", hint, ok: "Save" });
    if (name !== null) await this.change(() => this.#conversation.save(name));
  }

  async #mark() {
    const name = await ask({ title: "Name this point", label: "Name", hint: "You can rewind to it later.", ok: "Mark" });
    if (name) await this.change(() => this.#conversation.mark(name));
  }

  /** Continues in a copy of conversation and state. */
  async fork() {
    const hint = "The other one stays as it is.";
    const name = await ask({ title: "Fork this conversation", label: "Name of the copy", hint, ok: "Fork" });
    if (name !== null) await this.change(async () => this.#on.forked(await this.#conversation.fork(name)));
  }

  #welcome() {
    const use = (text) => {
      find("question").value = text;
      this.#drawComposer();
      this.#send();
    };
    const examples = EXAMPLES.map((text) =>
      h("button", { type: "button", class: "quiet", disabled: !this.#isReady, onclick: () => use(text) }, text),
    );
    return h(
      "div",
      { class: "welcome" },
      h("h2", {}, "A conversation of constant size"),
      h("p", {}, "This model remembers in a state that does not grow. What you write stays in this browser, over reloads and restarts."),
      h("div", { class: "row" }, ...examples),
    );
  }
}

/** Who reads the end goes on reading it: answers grow, and the question below takes more room. */
function stayAtEnd(log) {
  let isAtEnd = true;
  log.addEventListener("scroll", () => (isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60));
  const follow = () => isAtEnd && toEnd(log);
  new ResizeObserver(() => requestAnimationFrame(follow)).observe(log);
  new MutationObserver(follow).observe(log, { childList: true, characterData: true, subtree: true });
}

function toEnd(log) {
  log.scrollTop = log.scrollHeight;
}

function unknownPast(state) {
  return h(
    "div",
    { class: "welcome" },
    h("h2", {}, `${count(state.num_tokens)} tokens are remembered`),
    h("p", {}, "They are in the state, as numbers. Their text is not: it was said elsewhere. Just continue."),
  );
}
