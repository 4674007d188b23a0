// What is typed and not sent yet: by conversation and tab, over reloads and kills.

const PREFIX = "draft/";
/** The place of what begins a conversation. */
export const NEW = "new";
/** The place of what a message is being changed to. */
export const editing = (turn) => `${turn.conversation}:${turn.id}`;

export class Drafts {
  #store;
  #tab;
  #texts;
  #living;

  constructor(store, tab, texts, living) {
    [this.#store, this.#tab, this.#texts, this.#living] = [store, tab, texts, living];
  }

  /** `tab`: this one's id, which it keeps over a reload. */
  static async load(store, tab) {
    // Where the browser has locks, a tab holds one for as long as it is there.
    navigator.locks?.request(PREFIX + tab, () => new Promise(() => {}));
    const { held } = (await navigator.locks?.query()) ?? { held: [] };
    return new Drafts(store, tab, await store.settings(PREFIX), new Set(held.map(({ name }) => name.slice(PREFIX.length))));
  }

  /** What was typed here, or in a tab that is gone: that one's draft becomes this one's. */
  of(place) {
    const own = this.#texts.get(this.#name(place));
    if (own !== undefined) return own;
    for (const [name, text] of this.#texts) {
      const [, where, tab] = name.split("/");
      if (where !== place || this.#living.has(tab)) continue;
      this.#put(name, "");
      this.keep(place, text);
      return text;
    }
    return "";
  }

  /** Stores a draft; an empty one is none. */
  keep(place, text) {
    this.#put(this.#name(place), text);
  }

  /** Forgets those of conversations that are not there any more. */
  async purge() {
    for (const name of [...this.#texts.keys()]) {
      const id = name.split("/")[1].split(":")[0];
      if (id !== NEW && !(await this.#store.conversation(id))) this.#put(name, "");
    }
  }

  #name(place) {
    return `${PREFIX}${place}/${this.#tab}`;
  }

  #put(name, text) {
    if (text === "") this.#texts.delete(name);
    else this.#texts.set(name, text);
    this.#store.putSetting(name, text === "" ? undefined : text);
  }
}
