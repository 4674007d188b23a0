// What is kept in this browser: conversations, their turns, and settings.
//
// A turn is a record of its own and is written by the tab that makes it, so two tabs never overwrite one another: what
// both say in one conversation lies side by side, as branches. Fields of a conversation change one by one, each in a
// transaction that reads first.

const [NAME, VERSION] = ["dijiang", 1];
const [CONVERSATIONS, TURNS, SETTINGS] = ["conversations", "turns", "settings"];
const BY_CONVERSATION = "conversation";

/** Another tab has begun to write the same turn; what is to be written belongs beside it. */
export class TakenError extends Error {}

/** The store of this browser; one that lasts as long as the page where the browser keeps nothing. */
export async function openStore(factory = globalThis.indexedDB) {
  try {
    const request = factory.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
      request.result.createObjectStore(TURNS, { keyPath: "id" }).createIndex(BY_CONVERSATION, BY_CONVERSATION);
      request.result.createObjectStore(SETTINGS);
    };
    return new Store(new IndexedRecords(await result(request)));
  } catch {
    return new Store(new Records());
  }
}

export class Store {
  #records;
  #channel = null;
  #listeners = [];

  constructor(records = new Records()) {
    this.#records = records;
    if (!this.lasts || typeof BroadcastChannel === "undefined") return;
    this.#channel = new BroadcastChannel(NAME);
    this.#channel.onmessage = ({ data }) => this.#listeners.forEach((listen) => listen(data));
    this.#channel.unref?.(); // Node would wait for it
  }

  /** Whether what is written here is there after a reload. */
  get lasts() {
    return this.#records.lasts;
  }

  /** `listen(id)`: another tab has changed that conversation. */
  onChange(listen) {
    this.#listeners.push(listen);
  }

  /** All that are not deleted, the last used first. */
  async conversations() {
    const all = await this.#records.all(CONVERSATIONS);
    return all.filter((one) => one.deleted === null).sort((a, b) => b.updated - a.updated);
  }

  conversation(id) {
    return this.#records.get(CONVERSATIONS, id);
  }

  /** Changes what is stored, not what this tab remembers; `missing` is stored where there is nothing. */
  async change(id, change, missing = null) {
    const stored = await this.#records.change(CONVERSATIONS, id, (record) => {
      const changed = record ?? missing;
      if (changed !== null) change(changed);
      return changed;
    });
    this.#announce(id);
    return stored;
  }

  turns(conversation) {
    return this.#records.all(TURNS, conversation);
  }

  async turn(id) {
    return (await this.#records.get(TURNS, id)) ?? null;
  }

  /** Stores a turn; throws `TakenError` where another tab has begun to write it. `quiet`: more of it will come. */
  async putTurn(turn, { quiet = false } = {}) {
    await this.#records.change(TURNS, turn.id, (stored) => {
      if (stored && stored.run !== turn.run && stored.run !== turn.before) throw new TakenError();
      return turn;
    });
    if (!quiet) this.#announce(turn.conversation);
  }

  /** Stores conversations with their turns, all or nothing. */
  async add(conversations, turns) {
    await this.#records.put({ [CONVERSATIONS]: conversations, [TURNS]: turns });
    conversations.forEach(({ id }) => this.#announce(id));
  }

  /** Ids of the conversations in which all of these words are, in whatever letters. */
  async search(text) {
    const words = text.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const said = new Map();
    const note = (id, more) => said.set(id, `${said.get(id) ?? ""}\n${more.toLocaleLowerCase()}`);
    for (const one of await this.conversations()) note(one.id, one.title);
    for (const turn of await this.#records.all(TURNS)) if (said.has(turn.conversation)) note(turn.conversation, turn.text);
    return new Set([...said].filter(([, all]) => words.every((word) => all.includes(word))).map(([id]) => id));
  }

  /** Removes for good what was deleted before that time. */
  async purge(before) {
    for (const { id, deleted } of await this.#records.all(CONVERSATIONS)) {
      if (deleted === null || deleted >= before) continue;
      const turns = await this.turns(id);
      await this.#records.remove({ [CONVERSATIONS]: [id], [TURNS]: turns.map((turn) => turn.id) });
    }
  }

  setting(name) {
    return this.#records.get(SETTINGS, name);
  }

  setSetting(name, value) {
    return this.#records.change(SETTINGS, name, () => value);
  }

  /** Those whose names begin so, by name. */
  settings(prefix) {
    return this.#records.beginningWith(SETTINGS, prefix);
  }

  /** Writes a setting at once, for a page may be about to go; undefined: there is none any more. */
  putSetting(name, value) {
    this.#records.send(SETTINGS, name, value);
  }

  #announce(id) {
    this.#channel?.postMessage(id);
  }
}

/** Records in memory: what the store needs, and no more. */
export class Records {
  lasts = false;
  #tables = { [CONVERSATIONS]: new Map(), [TURNS]: new Map(), [SETTINGS]: new Map() };

  async get(table, key) {
    return structuredClone(this.#tables[table].get(key));
  }

  async all(table, conversation) {
    const records = [...this.#tables[table].values()];
    return structuredClone(conversation === undefined ? records : records.filter((one) => one.conversation === conversation));
  }

  async change(table, key, change) {
    const changed = change(structuredClone(this.#tables[table].get(key)));
    if (changed !== null) this.#tables[table].set(key, structuredClone(changed));
    return changed;
  }

  async beginningWith(table, prefix) {
    return new Map([...this.#tables[table]].filter(([key]) => key.startsWith(prefix)));
  }

  send(table, key, value) {
    if (value === undefined) this.#tables[table].delete(key);
    else this.#tables[table].set(key, value);
  }

  async put(records) {
    for (const [table, some] of Object.entries(records)) {
      for (const one of some) this.#tables[table].set(one.id, structuredClone(one));
    }
  }

  async remove(keys) {
    for (const [table, some] of Object.entries(keys)) some.forEach((key) => this.#tables[table].delete(key));
  }
}

/** The same in IndexedDB. */
class IndexedRecords {
  lasts = true;
  #database;

  constructor(database) {
    this.#database = database;
    database.onversionchange = () => database.close(); // a newer page wants to change it
  }

  get(table, key) {
    return result(this.#database.transaction(table).objectStore(table).get(key));
  }

  all(table, conversation) {
    const records = this.#database.transaction(table).objectStore(table);
    return result(conversation === undefined ? records.getAll() : records.index(BY_CONVERSATION).getAll(conversation));
  }

  async change(table, key, change) {
    const transaction = this.#writing([table]);
    const records = transaction.objectStore(table);
    const done = finished(transaction);
    done.catch(() => {}); // told below, after what has caused it
    const stored = await result(records.get(key));
    let changed;
    try {
      changed = change(stored);
    } catch (error) {
      transaction.abort();
      throw error;
    }
    if (changed !== null) records.put(changed, ...(records.keyPath === null ? [key] : []));
    await done;
    return changed;
  }

  async beginningWith(table, prefix) {
    const range = IDBKeyRange.bound(prefix, `${prefix}\uffff`);
    const records = this.#database.transaction(table).objectStore(table);
    const [keys, values] = await Promise.all([result(records.getAllKeys(range)), result(records.getAll(range))]);
    return new Map(keys.map((key, number) => [key, values[number]]));
  }

  /** One request and its end, both on their way before this returns: the browser finishes what a page has begun. */
  send(table, key, value) {
    const transaction = this.#writing([table], "relaxed");
    const records = transaction.objectStore(table);
    if (value === undefined) records.delete(key);
    else records.put(value, key);
    transaction.commit?.();
  }

  async put(records) {
    const transaction = this.#writing(Object.keys(records));
    for (const [table, some] of Object.entries(records)) some.forEach((one) => transaction.objectStore(table).put(one));
    await finished(transaction);
  }

  async remove(keys) {
    const transaction = this.#writing(Object.keys(keys));
    for (const [table, some] of Object.entries(keys)) some.forEach((key) => transaction.objectStore(table).delete(key));
    await finished(transaction);
  }

  #writing(tables, durability = "strict") {
    return this.#database.transaction(tables, "readwrite", { durability });
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("Another tab uses an older version of this page."));
  });
}

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onerror = transaction.onabort = () => reject(transaction.error ?? new Error("Nothing was written."));
  });
}
