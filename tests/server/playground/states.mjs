// Conversations and states of the playground against a real server: run by test_logic.py with modules, address, key.

import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";

const [modules, address, key] = process.argv.slice(2);
const folder = pathToFileURL(`${modules}/`);
const { Api, ApiError } = await import(new URL("api.mjs", folder));
const { Conversation, Transcripts } = await import(new URL("conversation.mjs", folder));

class Storage {
  #items = new Map();
  getItem = (name) => this.#items.get(name) ?? null;
  setItem = (name, value) => void this.#items.set(name, value);
  removeItem = (name) => void this.#items.delete(name);
}

const api = new Api(new URL(address), () => key);
const storage = new Storage();
const fresh = () => new Conversation(api, new Transcripts(storage));
const GREEDY = { temperature: 0, max_tokens: 6, ignore_eos: true };

async function say(conversation, text, more = {}) {
  let last;
  for await (const progress of conversation.say(text, { ...GREEDY, ...more })) last = progress;
  return last;
}

const refused = await new Api(new URL(address), () => "").models().catch((error) => error);
assert.ok(refused instanceof ApiError);
assert.deepEqual([refused.status, refused.code], [401, "invalid_api_key"]);
assert.equal((await api.models()).data.length, 1);
const capacity = await api.capacity();
assert.ok(capacity.state_bytes > 0 && capacity.kv_cache_bytes_per_token > 0);

// Kept here alone: every message carries all turns.
const talk = fresh();
talk.system = "Be brief.";
const first = await say(talk, "Hé?");
assert.equal(first.usage.completion_tokens, 6);
assert.equal(first.turn.finish, "length");
assert.deepEqual(talk.turns.map((turn) => turn.role), ["user", "assistant"]);

// Saved: every message carries only itself, and is as it would have been.
const alone = fresh();
alone.system = talk.system;
alone.turns = structuredClone(talk.turns);
await talk.save("trip");
assert.equal(talk.state.name, "trip");
const before = talk.state.num_tokens;
await talk.mark("start");
const second = await say(talk, "And then?");
const sameAlone = await say(alone, "And then?");
assert.equal(second.turn.text, sameAlone.turn.text);
assert.equal(second.usage.prompt_tokens, sameAlone.usage.prompt_tokens);
assert.ok(second.usage.prompt_tokens_details.cached_tokens >= before - 1);
assert.ok(talk.state.num_tokens > before);
const size = talk.state.bytes;

// Forks go their own way.
const other = fresh();
other.resume(talk.state);
assert.deepEqual(other.turns.map((turn) => turn.text), talk.turns.map((turn) => turn.text));
assert.equal(other.system, "Be brief.");
await other.fork("branch");
await say(other, "Elsewhere?");
assert.deepEqual([other.turns.length, talk.turns.length], [6, 4]);
assert.notEqual(other.state.id, talk.state.id);

// Back to a point, and on from there with the same words.
await talk.rewind("start");
assert.equal(talk.state.num_tokens, before);
assert.equal(talk.turns.length, 2);
const again = await say(talk, "And then?");
assert.equal(again.turn.text, second.turn.text);

// A fork from a point knows what was said until there.
await talk.fork("from start", "start");
assert.deepEqual([talk.turns.length, talk.state.num_tokens], [2, before]);

// Stopping leaves the state as it was; what was said of it is marked, and not remembered.
const stopping = new AbortController();
const error = await (async () => {
  for await (const { turn } of talk.say("Long?", { ...GREEDY, max_tokens: 4000 }, stopping.signal)) {
    if (turn.text !== "") stopping.abort();
  }
})().catch((caught) => caught);
assert.equal(error.name, "AbortError");
assert.equal((await api.state(talk.state.id)).num_tokens, before);
assert.deepEqual(talk.turns.slice(-2).map((turn) => turn.unsaved), [true, true]);
const back = fresh();
back.resume(await api.state(talk.state.id));
assert.equal(back.turns.length, 2);

// What the server refuses leaves the turns as they were.
await assert.rejects(say(back, "x", { temperature: 7 }), ApiError);
assert.equal(back.turns.length, 2);

// Out as a file and in again: the same size, the same answer; its text is not known here.
const file = await api.exportState(back.state.id);
assert.equal(file.size, (await api.state(back.state.id)).bytes);
const moved = fresh();
moved.resume(await api.importState(file, "moved"));
assert.ok(moved.hasUnknownPast);
assert.equal((await say(moved, "And then?")).turn.text, second.turn.text);
assert.ok(!moved.hasUnknownPast);
await assert.rejects(api.importState(new Blob(["nonsense"]), "bad"), ApiError);

// States have one size, whatever their length; deleting one forgets it.
const states = await api.states();
assert.deepEqual(states.map((state) => state.name).sort(), ["branch", "from start", "moved", "trip"]);
assert.ok(states.every((state) => Math.abs(state.bytes - size) < 200));
for (const state of states) await api.deleteState(state.id);
assert.deepEqual(await api.states(), []);

// Nothing to save is told.
await assert.rejects(fresh().save("empty"), /nothing to save/);
console.log("ok");
