// Conversations over a server that is scripted, and what is stored of them: run by test_logic.py.

import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";

const folder = pathToFileURL(`${process.argv[2]}/`);
const load = (name) => import(new URL(name, folder));
const { Conversation } = await load("conversation.mjs");
const { ApiError } = await load("api.mjs");
const { Drafts, editing, NEW } = await load("drafts.mjs");
const { Store, TakenError } = await load("store.mjs");

/** Says the pieces of `script`; an error in it is thrown. */
class Api {
  bodies = [];
  script = [];

  async *chat(body, signal) {
    this.bodies.push(structuredClone(body));
    let tokens = 0;
    for (const piece of this.script.shift()) {
      if (piece instanceof Error) throw piece;
      if (signal?.aborted) throw Object.assign(new Error("aborted"), { name: "AbortError" });
      const choice = typeof piece === "string" ? { delta: { content: piece } } : { delta: {}, ...piece };
      yield { choices: [choice], usage: { completion_tokens: ++tokens, total_tokens: 10 + tokens } };
    }
  }
}

const STOP = { finish_reason: "stop" };
const api = new Api();
const store = new Store();
const problems = [];
const talk = (tab = "one") => new Conversation(api, store, { tab, onProblem: (error) => problems.push(error) });
const texts = (one) => one.path.map(({ text }) => text);

async function all(steps) {
  let last;
  for await (const step of steps) last = step;
  return last;
}

async function opened(id, tab = "one") {
  const one = talk(tab);
  assert.ok(await one.open(id));
  return one;
}

// What is said is stored before it is sent, and the answer when it has ended.
const first = talk();
api.script = [["He", "llo", STOP]];
const steps = first.say("Hi there", {});
await steps.next();
assert.deepEqual((await store.turns(first.record.id)).map(({ text }) => text), ["Hi there", ""]);
const last = await all(steps);
assert.deepEqual(texts(first), ["Hi there", "Hello"]);
assert.deepEqual([last.turn.end, last.turn.stats.tokens, last.turn.total], ["stop", 3, 13]);
const id = first.record.id;
assert.deepEqual(texts(await opened(id)), ["Hi there", "Hello"]);
assert.deepEqual((await store.conversations()).map(({ title }) => title), ["Hi there"]);
assert.equal(await talk().open("nothing"), false);

// Regenerating and editing make branches; each is stored, and all can be shown.
api.script = [["Hey", STOP], ["Bonjour", STOP]];
await all(first.regenerate(first.path[1], { seed: 5 }));
assert.equal(api.bodies.at(-1).seed, 6);
assert.deepEqual(texts(first), ["Hi there", "Hey"]);
await all(first.edit(first.path[0], "Salut", {}));
assert.deepEqual(texts(first), ["Salut", "Bonjour"]);
assert.deepEqual(api.bodies.at(-1).messages.map(({ content }) => content), ["Salut"]);
const again = await opened(id);
assert.deepEqual(texts(again), ["Salut", "Bonjour"]);
await again.show(again.siblings(again.path[0])[0]);
assert.deepEqual(texts(again), ["Hi there", "Hey"]);
assert.equal(again.siblings(again.path[1]).length, 2);

// An error in mid-answer keeps the text; the rest comes behind it.
api.script = [["Once ", "upon ", new ApiError("the engine died", { status: 0 })], ["a time", STOP]];
await assert.rejects(all(again.say("A story", {})), /the engine died/);
const broken = again.path.at(-1);
assert.deepEqual([broken.text, again.endOf(broken), broken.error], ["Once upon ", "error", "the engine died"]);
const later = await opened(id);
assert.ok(later.canContinue(later.path.at(-1)));
await all(later.continue(later.path.at(-1), {}));
assert.deepEqual([later.path.at(-1).text, later.path.at(-1).end], ["Once upon a time", "stop"]);
assert.ok(!later.canContinue(later.path.at(-1)));
assert.equal(api.bodies.at(-1).messages.at(-1).content, "Once upon ");
assert.equal(later.path.at(-1).stats.tokens, 4, "of both parts");

// A server that stops gives a state to continue from; once there is more text it is behind.
api.script = [["One ", new ApiError("stopped", { code: "server_shutdown", stateId: "state_s" })], ["two", { finish_reason: "length" }], ["!", STOP]];
await assert.rejects(all(later.say("Count", {})));
await all(later.continue(later.path.at(-1), {}));
assert.deepEqual([api.bodies.at(-1).state_id, api.bodies.at(-1).messages], ["state_s", []]);
await all(later.continue(later.path.at(-1), {}));
assert.deepEqual([later.path.at(-1).text, api.bodies.at(-1).state_id], ["One two!", undefined]);

// A state to continue from that is gone: then the text has to do.
api.script = [["a", new ApiError("stopped", { stateId: "gone" })], [new ApiError("no such state", { status: 404, code: "state_not_found" })], ["b", STOP]];
await assert.rejects(all(later.say("Letters", {})));
await all(later.continue(later.path.at(-1), {}));
assert.equal(later.path.at(-1).text, "ab");

// Nothing came: the message is kept, and can be answered later.
api.script = [[new ApiError("not reachable")], ["Here.", STOP]];
await assert.rejects(all(later.say("Anybody?", {})));
assert.deepEqual([later.path.at(-2).text, later.canContinue(later.path.at(-1))], ["Anybody?", false]);
await all(later.retry(later.path.at(-1), {}));
assert.deepEqual(texts(later).slice(-2), ["Anybody?", "Here."]);

// Stopped by whoever reads it.
api.script = [["x", "y", "z", STOP]];
for await (const { turn } of later.say("Stop me", {})) if (turn.text === "xy") break;
assert.deepEqual([later.path.at(-1).text, later.path.at(-1).end], ["xy", "stopped"]);

// A tab that is gone in mid-answer leaves what there was; the same tab knows at once, others a while later.
api.script = [["half ", STOP]];
const dying = later.say("Die", {});
await dying.next();
await dying.next();
const { id: growing, kept } = later.path.at(-1);
await store.putTurn(structuredClone(later.path.at(-1)));
const [same, other] = [await opened(id, "one"), await opened(id, "two")];
const end = (one, now) => one.endOf(one.turns.get(growing), now);
assert.deepEqual([end(same, kept), end(other, kept + 1000), end(other, kept + 60_000)], ["cut", null, "cut"]);
assert.ok(same.canContinue(same.turns.get(growing)));

// Two tabs that continue the same answer: neither overwrites the other.
api.script = [["of two", STOP]];
await all(other.continue(other.turns.get(growing), {}));
later.turns.get(growing).text += "of one";
await assert.rejects(store.putTurn(later.turns.get(growing)), TakenError);
await dying.return(); // stores what it has, beside the other
const both = await opened(id);
const halves = both.siblings(both.turns.get(growing)).map(({ text }) => text);
assert.deepEqual(halves.sort(), ["half of one", "half of two"]);

// Two tabs that say something at once: both are there, as branches.
const [left, right] = [await opened(id, "left"), await opened(id, "right")];
api.script = [["to left", STOP], ["to right", STOP]];
await Promise.all([all(left.say("from left", {})), all(right.say("from right", {}))]);
await left.reread();
assert.deepEqual(left.siblings(left.path.at(-2)).map(({ text }) => text).sort(), ["from left", "from right"]);
await left.rename("Two tabs");
await right.setSystem("Be kind.");
const stored = await store.conversation(id);
assert.deepEqual([stored.title, stored.system], ["Two tabs", "Be kind."]);

// Search is in titles and texts; what is deleted is not found, and is back when it is said in again.
assert.deepEqual([...(await store.search("UPON time"))], [id]);
assert.deepEqual([...(await store.search("tabs"))], [id]);
assert.deepEqual([...(await store.search("never said"))], []);
await store.change(id, (record) => Object.assign(record, { deleted: 5 }));
assert.deepEqual([await store.conversations(), [...(await store.search("upon"))]], [[], []]);
api.script = [["back", STOP]];
await all(left.say("Still here", {}));
assert.equal((await store.conversations()).length, 1);
await store.change(id, (record) => Object.assign(record, { deleted: 5 }));

// Drafts are there for as long as their conversation can be brought back.
const drafts = new Drafts(store, "one", new Map(), new Set());
const changing = editing({ conversation: id, id: "turn" });
for (const place of [NEW, id, changing]) drafts.keep(place, `in ${place}`);
await drafts.purge();
assert.equal((await store.settings("draft/")).size, 3);
await store.purge(6);
assert.deepEqual([await store.conversation(id), await store.turns(id)], [undefined, []]);
await drafts.purge();
assert.deepEqual([...(await store.settings("draft/")).values()], [`in ${NEW}`]);
assert.deepEqual([drafts.of(NEW), drafts.of(id), drafts.of(changing)], [`in ${NEW}`, "", ""]);

// A browser that cannot store says so, and the answer comes all the same.
assert.deepEqual(problems, []);
const full = talk();
store.putTurn = () => Promise.reject(new Error("the disk is full"));
api.script = [["Yes.", STOP]];
await all(full.say("Hello?", {}));
assert.deepEqual([texts(full), problems[0].message], [["Hello?", "Yes."], "the disk is full"]);
console.log("ok");
