// A conversation: its turns, and where the server keeps it. No page is needed for this.
//
// Without a saved state, every request carries all turns. With one, it carries only what is new: the state, of constant
// size, is the rest. A state holds no text, so what was said is remembered here, for as long as the tab is open.

/** What was said in each state, in a storage of the browser. */
export class Transcripts {
  #storage;
  #prefix = "dijiang.transcript.";

  constructor(storage) {
    this.#storage = storage;
  }

  get(id) {
    try {
      return JSON.parse(this.#storage.getItem(this.#prefix + id));
    } catch {
      return null;
    }
  }

  set(id, transcript) {
    try {
      this.#storage.setItem(this.#prefix + id, JSON.stringify(transcript));
    } catch {
      // It is full. The states themselves are at the server.
    }
  }

  delete(id) {
    this.#storage.removeItem(this.#prefix + id);
  }
}

export class Conversation {
  /** `{role, text, thought}` each; `unsaved`: a state has not seen it. */
  turns = [];
  /** Where the conversation is kept: a state as the server describes it; null: here alone. */
  state = null;
  system = "";
  #systemSent = "";
  #points = {};
  #api;
  #transcripts;

  constructor(api, transcripts) {
    this.#api = api;
    this.#transcripts = transcripts;
  }

  /** Whether the beginning was said elsewhere, so that only the state knows it. */
  get hasUnknownPast() {
    return this.state !== null && this.turns.length === 0 && this.state.num_tokens > 0;
  }

  /**
   * Says something; the answer's turn, again and again while it grows.
   *
   * What is stopped before its end stays in a conversation that is kept here, and leaves one in a state as it was.
   */
  async *say(text, options, signal) {
    const question = { role: "user", text };
    const answer = { role: "assistant", text: "", thought: "" };
    const body = { ...options, messages: this.#messages(question), ...this.#stateFields() };
    const [system, state] = [this.system, this.state];
    this.turns.push(question, answer);
    let stateId = null;
    try {
      for await (const chunk of this.#api.chat(body, signal)) {
        const choice = chunk.choices[0];
        answer.thought += choice?.delta.reasoning_content ?? "";
        answer.text += choice?.delta.content ?? "";
        answer.finish = choice?.finish_reason ?? answer.finish;
        stateId = choice?.state_id ?? stateId;
        yield { turn: answer, usage: chunk.usage };
      }
    } catch (error) {
      this.#breakOff(question, answer, error);
      throw error;
    }
    if (state !== null) {
      this.state = await this.#api.state(stateId ?? state.id);
      this.#systemSent = system;
      this.#remember();
    }
  }

  /** Keeps what was said so far as a state. */
  async save(name) {
    const messages = this.#transcript();
    if (messages.length === 0) throw new Error("There is nothing to save yet: say something, or set a system prompt.");
    this.state = await this.#api.createState(messages, name || undefined);
    this.#systemSent = this.system;
    this.#points = {};
    this.#remember();
  }

  /** Goes on with a saved state. */
  resume(state) {
    const known = this.#transcripts.get(state.id);
    this.state = state;
    this.turns = known?.turns ?? [];
    this.#points = known?.points ?? {};
    this.system = this.#systemSent = known?.system ?? "";
  }

  /** Begins anew; saved states stay. */
  reset() {
    this.turns = [];
    this.state = null;
    this.#systemSent = "";
    this.#points = {};
  }

  /** Gives the place where the conversation is a name. */
  async mark(name) {
    this.state = await this.#api.markState(this.state.id, name);
    this.#points[name] = this.#saved().length;
    this.#remember();
  }

  async rewind(point) {
    this.state = await this.#api.rewindState(this.state.id, point);
    this.turns = this.#saved().slice(0, this.#points[point] ?? 0);
    this.#remember();
  }

  /** Leaves the state as it is, and goes on in a copy of it. */
  async fork(name, point) {
    const fork = await this.#api.forkState(this.state.id, { name: name || undefined, point: point || undefined });
    const length = point ? (this.#points[point] ?? 0) : this.turns.length;
    this.turns = this.#saved().slice(0, length);
    this.state = fork;
    this.#points = {};
    this.#remember();
  }

  #messages(question) {
    if (this.state === null) return [...this.#transcript(), message(question)];
    const isNew = this.system !== "" && this.system !== this.#systemSent;
    return [...(isNew ? [{ role: "system", content: this.system }] : []), message(question)];
  }

  #transcript() {
    const system = this.system === "" ? [] : [{ role: "system", content: this.system }];
    return [...system, ...this.turns.filter((turn) => turn.text !== "").map(message)];
  }

  #stateFields() {
    return this.state === null ? {} : { state_id: this.state.id, return_state: { update: true } };
  }

  #breakOff(question, answer, error) {
    const isStopped = error.name === "AbortError";
    if (isStopped) answer.stopped = true;
    if (this.state !== null) question.unsaved = answer.unsaved = true;
    if (!isStopped || answer.text === "") {
      const both = new Set([question, answer]);
      this.turns = this.turns.filter((turn) => !both.has(turn)); // so that it can be said again
    }
  }

  #saved() {
    return this.turns.filter((turn) => !turn.unsaved);
  }

  #remember() {
    const { turns, system } = { turns: this.#saved(), system: this.#systemSent };
    this.#transcripts.set(this.state.id, { turns, points: this.#points, system });
  }
}

function message(turn) {
  return { role: turn.role, content: turn.text };
}
