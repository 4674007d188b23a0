// One conversation: what was said, where the server keeps it, and what is asked next. No page is needed for this.
//
// Everything is stored in the browser before it is sent and while it comes. Without a saved state every request carries
// all turns. With one it carries only what is new: the state, of constant size, is the rest. A state holds no text.

import { Stopwatch } from "./measure.mjs";
import { continuation, fail, messagesOf, question, ROOT, stateOn, take } from "./prompts.mjs";
import { TakenError } from "./store.mjs";
import { emptyRecord } from "./transfer.mjs";
import { newestLeaf, newId, pathTo, siblings, titleOf } from "./tree.mjs";

const KEEP_EVERY_MS = 250;
const BEAT_MS = 2_000;
/** An answer that was stored so long ago without an end belongs to a tab that is gone. */
const GONE_AFTER_MS = 10_000;
const GONE_STATES = ["state_not_found", "state_of_another_model", "state_invalid"];

export class Conversation {
  record;
  turns = new Map();
  /** What the server says of the state in use; null: there is none. */
  state = null;
  #api;
  #store;
  #tab;
  #onProblem;
  #running = new Set();

  /** `tab`: a name of this tab that outlives a reload; `onProblem`: called with what kept something from being stored. */
  constructor(api, store, { tab = newId(), system = "", onProblem = () => {} } = {}) {
    this.#api = api;
    this.#store = store;
    this.#tab = tab;
    this.#onProblem = onProblem;
    this.record = { ...emptyRecord(newId()), system };
  }

  /** Shows one that is stored; false: there is none of this name. */
  async open(id) {
    const record = await this.#store.conversation(id);
    if (!record) return false;
    this.record = record;
    await this.reread();
    await this.refreshState();
    return true;
  }

  /** What other tabs have changed in it meanwhile. */
  async reread() {
    const [stored, turns] = await Promise.all([this.#store.conversation(this.record.id), this.#store.turns(this.record.id)]);
    const own = [...this.turns.values()].filter(({ id }) => this.#running.has(id));
    this.turns = new Map([...turns, ...own].map((turn) => [turn.id, turn]));
    if (stored) this.record = { ...stored, leaf: this.record.leaf };
    if (this.record.leaf !== null && !this.turns.has(this.record.leaf)) this.record.leaf = newestLeaf(this.turns, null);
  }

  /** The turns that are shown. */
  get path() {
    return pathTo(this.turns, this.record.leaf);
  }

  get stateId() {
    return stateOn(this.record, this.path)?.id ?? null;
  }

  /** Whether the model would know all that was said: a past without text is known by a state alone. */
  get canSay() {
    return !this.record.isPartial || this.stateId !== null;
  }

  siblings(turn) {
    return siblings(this.turns, turn);
  }

  /** How a turn ended: null while it grows, here or in another tab. */
  endOf(turn, now = Date.now()) {
    if (turn.role === "user") return "stop";
    if (turn.end !== null) return turn.end ?? "stop";
    if (this.#running.has(turn.id)) return null;
    return turn.tab === this.#tab || now - turn.kept > GONE_AFTER_MS ? "cut" : null;
  }

  /** Whether an answer ended early, and there is something to continue from. */
  canContinue(turn) {
    const isCut = turn.role === "assistant" && ![null, "stop"].includes(this.endOf(turn));
    const isAtEnd = turn.id === this.record.leaf && this.#knowsUpTo(turn);
    return isCut && isAtEnd && (turn.text !== "" || turn.resume !== undefined);
  }

  /** Whether the model would know all that comes before the end of this answer. */
  #knowsUpTo(turn) {
    const at = stateOn(this.record, pathTo(this.turns, turn.id));
    return !this.record.isPartial || (at !== null && (at.turn !== turn.id || at.isOpen));
  }

  /** Whether a turn can be said in another way: the model would know everything before it. */
  canBranch(turn) {
    return !this.record.isPartial || stateOn(this.record, pathTo(this.turns, turn.parent)) !== null;
  }

  async setSystem(system) {
    if (system === this.record.system) return;
    this.record.system = system;
    if (this.turns.size > 0) await this.#change((record) => (record.system = system));
  }

  async rename(title) {
    await this.#change((record) => Object.assign(record, { title, hasName: true }));
  }

  /** Shows another branch: the newest end below this turn. */
  async show(turn) {
    await this.#setLeaf(newestLeaf(this.turns, turn.id));
    await this.refreshState();
  }

  /** Says something; gives `{turn, usage, watch}`, the answer again and again while it grows. */
  say(text, options, signal) {
    return this.#ask(text, this.record.leaf, options, signal);
  }

  /** Says something else in the place of a message. */
  edit(turn, text, options, signal) {
    return this.#ask(text, turn.parent, options, signal);
  }

  /** Another answer to the same message; a fixed seed is another one too. */
  async *regenerate(turn, options, signal) {
    const seed = options.seed === undefined ? {} : { seed: options.seed + this.siblings(turn).length };
    const answer = this.#turn("assistant", "", turn.parent);
    yield* this.#answer(answer, question, { ...options, ...seed }, signal);
  }

  /** Continues an answer that ended early. */
  async *continue(turn, options, signal) {
    const at = stateOn(this.record, this.path);
    if (at?.turn === turn.id && !at.isOpen) await this.#change((record) => delete record.states[turn.id]); // it is past the end
    const stored = (await this.#store.turn(turn.id)) ?? turn;
    yield* this.#answer(this.#claimed(stored), continuation, options, signal);
  }

  /** Asks again for an answer of which nothing came. */
  async *retry(turn, options, signal) {
    yield* this.#answer({ ...this.#claimed(turn), thought: "" }, question, options, signal);
  }

  /** Keeps what was said so far as a state at the server. */
  async save(name) {
    const messages = messagesOf(this.record, this.path, null);
    if (messages.length === 0) throw new Error("There is nothing to save yet: say something, or set a system prompt.");
    this.state = await this.#api.createState(messages, name || undefined);
    await this.#placeState(this.record.leaf ?? ROOT, this.state.id);
    if (name) await this.rename(name);
  }

  /** A conversation whose past is a state alone. */
  async adopt(state) {
    Object.assign(this.record, { title: state.name ?? state.id.slice(0, 14), hasName: true, isPartial: true });
    this.state = state;
    await this.#placeState(ROOT, state.id);
  }

  /** Gives the place where the conversation is a name. */
  async mark(name) {
    const at = stateOn(this.record, this.path);
    this.state = await this.#api.markState(at.id, name);
    await this.#change((record) => ((record.points[at.id] ??= {})[name] = at.turn));
  }

  async rewind(point) {
    const at = stateOn(this.record, this.path);
    this.state = await this.#api.rewindState(at.id, point);
    const turn = this.record.points[at.id]?.[point] ?? ROOT;
    await this.#moveState({ ...at, isOpen: this.turns.get(turn)?.end === "length" }, turn);
    await this.#setLeaf(turn === ROOT ? null : turn);
  }

  /** Leaves conversation and state as they are, and makes copies of both; gives the new one's id. */
  async fork(name) {
    const at = stateOn(this.record, this.path);
    const fork = await this.#api.forkState(at.id, { name: name || undefined });
    const ids = new Map(this.path.map((turn) => [turn.id, newId()]));
    const copies = this.path.map((turn) => ({
      ...turn,
      ...{ id: ids.get(turn.id), parent: ids.get(turn.parent) ?? null, conversation: this.record.id, run: newId() },
    }));
    const { system, isPartial, title } = this.record;
    const record = { ...emptyRecord(newId()), title: name || title, hasName: true, system, isPartial };
    record.leaf = ids.get(this.record.leaf) ?? null;
    record.states = { [ids.get(at.turn) ?? ROOT]: { id: fork.id, system: at.system, isOpen: at.isOpen } };
    await this.#store.add([record], copies.map((turn) => ({ ...turn, conversation: record.id })));
    return record.id;
  }

  /** Asks the server for the state in use; one that is gone is forgotten if the text is here. */
  async refreshState() {
    const at = stateOn(this.record, this.path);
    this.state = null;
    if (at === null) return;
    try {
      this.state = await this.#api.state(at.id);
    } catch (error) {
      if (!(await this.#forget(at, error))) this.state = { id: at.id, name: null, num_tokens: 0, bytes: 0, points: [] };
    }
  }

  async *#ask(text, parent, options, signal) {
    const asked = this.#turn("user", text, parent);
    const answer = this.#turn("assistant", "", asked.id);
    this.record.title ||= titleOf(text);
    await this.#keep(asked, { quiet: true });
    yield* this.#answer(answer, question, options, signal);
  }

  /** Sends what `body` makes of the way to the answer and fills it in; it is stored as it grows. */
  async *#answer(answer, body, options, signal) {
    this.turns.set(answer.id, answer);
    this.#running.add(answer.id);
    let soon = null;
    const keep = () => (soon = this.#keep(answer, { quiet: true }) && null);
    const beat = setInterval(keep, BEAT_MS);
    const [watch, system, numBefore] = [new Stopwatch(), this.record.system, answer.stats?.tokens ?? 0];
    try {
      await this.#keep(answer);
      delete answer.before;
      await this.#setLeaf(answer.id);
      yield { turn: answer, watch };
      for await (const chunk of this.#chunks(answer, body, options, signal)) {
        take(answer, chunk);
        watch.take(chunk.usage?.completion_tokens ?? 0);
        answer.stats = statsOf(watch, chunk.usage, numBefore);
        soon ??= setTimeout(keep, KEEP_EVERY_MS);
        yield { turn: answer, usage: chunk.usage, watch };
      }
    } catch (error) {
      fail(answer, error);
      throw error;
    } finally {
      clearInterval(beat);
      clearTimeout(soon);
      answer.end ??= "stopped"; // who read it has left
      this.#running.delete(answer.id);
      await this.#keep(answer);
    }
    await this.#advance(answer, system);
  }

  /** Where a state is gone and the text is here, all of it is sent instead. */
  async *#chunks(answer, body, options, signal) {
    const path = () => pathTo(this.turns, body === question ? answer.parent : answer.id);
    const sent = () => body(this.record, path(), options);
    try {
      yield* this.#api.chat(sent(), signal);
    } catch (error) {
      const at = stateOn(this.record, path());
      const isResumed = GONE_STATES.includes(error.code) && answer.resume !== undefined;
      if (isResumed) delete answer.resume;
      else if (at === null || !(await this.#forget(at, error))) throw error;
      yield* this.#api.chat(sent(), signal);
    }
  }

  /** After an answer the state in use includes it. */
  async #advance(answer, system) {
    const at = stateOn(this.record, pathTo(this.turns, answer.id));
    if (at === null) return;
    if (answer.stateId === at.id) await this.#moveState({ ...at, system, isOpen: answer.end === "length" }, answer.id);
    await this.refreshState();
  }

  #placeState(turn, id) {
    return this.#change((record) => (record.states[turn] = { id, system: record.system, isOpen: false }));
  }

  #moveState({ turn, id, system, isOpen }, to) {
    return this.#change((record) => {
      delete record.states[turn];
      record.states[to] = { id, system, isOpen };
    });
  }

  /** Forgets a state that is gone; false: it is not, or nothing else knows what was said. */
  async #forget(at, error) {
    if (!GONE_STATES.includes(error.code) || this.record.isPartial) return false;
    await this.#change((record) => {
      if (record.states[at.turn]?.id === at.id) delete record.states[at.turn];
    });
    this.state = null;
    return true;
  }

  #turn(role, text, parent) {
    const now = Date.now();
    const turn = { id: newId(), conversation: this.record.id, parent, role, text, created: now, run: newId() };
    if (role === "assistant") Object.assign(turn, { thought: "", end: null, tab: this.#tab, kept: now });
    this.turns.set(turn.id, turn);
    return turn;
  }

  /** An answer that this tab writes from now on. */
  #claimed(turn) {
    return { ...turn, before: turn.run, run: newId(), tab: this.#tab, end: null, error: undefined };
  }

  #setLeaf(leaf) {
    return this.#change((record) => (record.leaf = leaf));
  }

  /** Changes the record here, and the stored one too, whatever another tab has made of it. */
  async #change(change) {
    const title = this.record.title;
    const used = (record) => {
      change(record);
      Object.assign(record, { title: record.title || title, updated: Date.now(), deleted: null });
    };
    used(this.record);
    await this.#store.change(this.record.id, used, structuredClone(this.record)).catch(this.#onProblem);
  }

  /** Stores a turn; what another tab writes stays as it is, and this tab's goes beside it. */
  async #keep(turn, how) {
    turn.kept = Date.now();
    try {
      await this.#store.putTurn(structuredClone(turn), how);
    } catch (error) {
      if (!(error instanceof TakenError)) return this.#onProblem(error);
      const wasRunning = this.#running.delete(turn.id);
      this.turns.delete(turn.id);
      if (this.record.leaf === turn.id) this.record.leaf = null;
      Object.assign(turn, { id: newId(), run: newId() });
      this.turns.set(turn.id, turn);
      this.record.leaf ??= turn.id;
      if (wasRunning) this.#running.add(turn.id);
      await this.#store.putTurn(structuredClone(turn), how).catch(this.#onProblem);
    }
    return undefined;
  }
}

function statsOf(watch, usage, numBefore) {
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? null;
  return { first: watch.firstMs, rate: watch.rate, tokens: numBefore + watch.tokens, cached };
}
