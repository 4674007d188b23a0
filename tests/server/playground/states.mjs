// Conversations and states of the playground against a real server: run by test_logic.py with modules, address, key.

import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";

const [modules, address, key] = process.argv.slice(2);
const folder = pathToFileURL(`${modules}/`);
const { Api, ApiError } = await import(new URL("api.mjs", folder));
const { Conversation } = await import(new URL("conversation.mjs", folder));
const { Store } = await import(new URL("store.mjs", folder));

const api = new Api(new URL(address), () => key);
const store = new Store();
const fresh = () => new Conversation(api, store);
const GREEDY = { temperature: 0, max_tokens: 6, ignore_eos: true };
const texts = (talk) => talk.path.map((turn) => turn.text);

async function opened(id) {
  const talk = fresh();
  assert.ok(await talk.open(id));
  return talk;
}

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

// Without a state every message carries all turns.
const talk = fresh();
await talk.setSystem("Be brief.");
const first = await say(talk, "Hé?");
assert.equal(first.usage.completion_tokens, 6);
assert.equal(first.turn.end, "length");
assert.deepEqual(talk.path.map((turn) => turn.role), ["user", "assistant"]);
const id = talk.record.id;

// The rest of an answer, from its text.
const begun = first.turn.text;
let rest;
for await (const step of talk.continue(talk.path.at(-1), GREEDY)) rest = step;
assert.ok(rest.turn.text.startsWith(begun) && rest.turn.text.length > begun.length);
assert.equal(rest.turn.stats.tokens, 12);

// With one every message carries only itself, and is as it would have been.
const alone = await opened(id);
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

// The rest of an answer, from its state.
for await (const step of talk.continue(talk.path.at(-1), GREEDY)) rest = step;
await talk.rewind("start");
await say(talk, "And then?", { max_tokens: 12 });
assert.equal(rest.turn.text, texts(talk).at(-1));

// Forks go their own way.
const other = await opened(await talk.fork("branch"));
assert.deepEqual(texts(other), texts(talk));
assert.equal(other.record.system, "Be brief.");
await say(other, "Elsewhere?");
assert.deepEqual([other.path.length, talk.path.length], [6, 4]);
assert.notEqual(other.stateId, talk.stateId);

// Back to a point, and on from there with the same words.
await talk.rewind("start");
assert.deepEqual([talk.state.num_tokens, talk.path.length], [before, 2]);
const again = await say(talk, "And then?");
assert.equal(again.turn.text, second.turn.text);

// Another answer to the same message does not go through the state, which stays where it is.
let another;
for await (const step of talk.regenerate(talk.path.at(-1), GREEDY)) another = step;
assert.equal(another.turn.text, second.turn.text);
assert.equal(talk.stateId, null);
await talk.show(talk.siblings(talk.path.at(-1))[0]);
assert.equal(talk.state.name, "trip");

// Stopping leaves the state as it was; what was said stays here, and is sent with the next message.
const length = talk.state.num_tokens;
const stopping = new AbortController();
const error = await (async () => {
  for await (const { turn } of talk.say("Long?", { ...GREEDY, max_tokens: 4000 }, stopping.signal)) {
    if (turn.text !== "") stopping.abort();
  }
})().catch((caught) => caught);
assert.equal(error.name, "AbortError");
assert.equal((await api.state(talk.stateId)).num_tokens, length);
assert.deepEqual([talk.path.at(-1).end, talk.canContinue(talk.path.at(-1))], ["stopped", true]);
for await (const step of talk.continue(talk.path.at(-1), GREEDY)) rest = step;
assert.ok(rest.turn.text.length > 1);
assert.ok(talk.state.num_tokens > length);

// A state that was saved behind an answer that was stopped is past its end: the rest comes from the text.
const stopped = fresh();
for await (const { turn } of stopped.say("Long?", { ...GREEDY, max_tokens: 4000 })) if (turn.text !== "") break;
await stopped.save("past the end");
for await (const step of stopped.continue(stopped.path.at(-1), GREEDY)) rest = step;
assert.equal(rest.turn.end, "length");
assert.equal(stopped.stateId, null);
await api.deleteState((await api.states()).find((state) => state.name === "past the end").id);

// What the server refuses is kept with the message.
await assert.rejects(say(talk, "x", { temperature: 7 }), ApiError);
assert.match(talk.path.at(-1).error, /temperature/);

// Out as a file and in again: the same size, the same answer; its text is not known here.
const file = await api.exportState(other.stateId);
assert.equal(file.size, (await api.state(other.stateId)).bytes);
const moved = fresh();
await moved.adopt(await api.importState(file, "moved"));
assert.ok(moved.record.isPartial);
const there = await say(moved, "And then?");
assert.equal((await say(other, "And then?")).turn.text, there.turn.text);
assert.ok(!moved.canBranch(moved.path[1]), "nobody knows what was said before");
assert.ok(moved.canSay);
await assert.rejects(api.importState(new Blob(["nonsense"]), "bad"), ApiError);

// States have one size, whatever their length; where one is gone and the text is here, all of it is sent.
const states = await api.states();
assert.deepEqual(states.map((state) => state.name).sort(), ["branch", "moved", "trip"]);
assert.ok(states.every((state) => Math.abs(state.bytes - size) < 200));
for (const state of states) await api.deleteState(state.id);
assert.deepEqual(await api.states(), []);
await say(other, "Do you know me?");
assert.equal(other.stateId, null);
await assert.rejects(say(moved, "And you?"), ApiError);

// Texts of tokens by their ids, whole and one by one.
assert.deepEqual(await api.textOf([72, 195, 169]), { prompt: "Hé", token_texts: ["H", "\ufffd", "\ufffd"] });

// Nothing to save is told.
await assert.rejects(fresh().save("empty"), /nothing to save/);
console.log("ok");
