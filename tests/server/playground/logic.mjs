// What the playground computes, without a page: run by test_logic.py with the folder of its modules.

import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";

const folder = pathToFileURL(`${process.argv[2]}/`);
const load = (name) => import(new URL(name, folder));
const { EventParser, readEvents } = await load("sse.mjs");
const { bytes, count, duration, memory, memorySentence, Stopwatch } = await load("measure.mjs");
const { idsOf, percent, perplexity, shadeOf, SHADES, tokensOf, visible } = await load("tokens.mjs");
const { newId, newestLeaf, pathTo, siblings, titleOf } = await load("tree.mjs");
const { emptyRecord, fromFile, toJson, toMarkdown } = await load("transfer.mjs");
const { continuation, question } = await load("prompts.mjs");

// Events, in whatever pieces they come.
const stream = ': hi\r\n\r\ndata: {"a":1}\n\nevent: x\rdata:two\rdata:  lines\r\rid: 7\nnonsense\n\ndata\n\ndata: é 😀\r\n\r\n';
const wanted = [
  { name: "message", data: '{"a":1}' },
  { name: "x", data: "two\n lines" },
  { name: "message", data: "" },
  { name: "message", data: "é 😀" },
];
for (let size = 1; size <= stream.length; size++) {
  const parser = new EventParser();
  const found = [];
  for (let at = 0; at < stream.length; at += size) found.push(...parser.push(stream.slice(at, at + size)));
  found.push(...parser.push("")); // the last line break may have been half of one
  assert.deepEqual(found, wanted, `pieces of ${size}`);
}
const encoded = new TextEncoder().encode(stream);
const body = new ReadableStream({
  start(controller) {
    for (const byte of encoded) controller.enqueue(Uint8Array.of(byte)); // characters are cut, too
    controller.close();
  },
});
const read = [];
for await (const event of readEvents(body)) read.push(event);
assert.deepEqual(read, wanted);

// A reader that stops early lets go of the body.
let cancelled = false;
const endless = new ReadableStream({
  pull: (controller) => controller.enqueue(new TextEncoder().encode("data: x\n\n")),
  cancel: () => void (cancelled = true),
});
for await (const event of readEvents(endless)) {
  assert.equal(event.data, "x");
  break;
}
assert.ok(cancelled);

// Memory and time.
const sizes = { state_bytes: 1000, kv_cache_bytes_per_token: 10 };
assert.deepEqual(memory(250, sizes), { tokens: 250, state: 1000, cache: 2500, crossing: 100, ratio: 2.5 });
assert.match(memorySentence(memory(250, sizes)), /2\.5 times as large/);
assert.match(memorySentence(memory(50, sizes)), /smaller up to 100 tokens/);
assert.equal(memory(5, { state_bytes: 9, kv_cache_bytes_per_token: 0 }).crossing, Infinity);
assert.deepEqual([0, 999, 4_446_720, 62_300_000].map(bytes), ["0 B", "999 B", "4.45 MB", "62.3 MB"]);
assert.deepEqual([count(12345), duration(null), duration(12.4), duration(1500)], ["12,345", "–", "12 ms", "1.5 s"]);
let now = 0;
const watch = new Stopwatch(() => now);
assert.deepEqual([watch.firstMs, watch.rate], [null, null]);
now = 200;
watch.take(0);
watch.take(2);
assert.deepEqual([watch.firstMs, watch.rate], [200, null]);
now = 1200;
watch.take(12);
now = 5000;
watch.take(12); // the end brings no token
assert.deepEqual([watch.firstMs, watch.rate], [200, 10]);

// Tokens.
const told = {
  tokens: ["token_id:3", "token_id:12"],
  token_logprobs: [null, Math.log(0.5)],
  top_logprobs: [null, { "token_id:7": Math.log(0.25), "token_id:12": Math.log(0.5) }],
};
const tokens = tokensOf(told);
assert.deepEqual(tokens[0], { id: 3, logprob: null, alternatives: [] });
assert.deepEqual(tokens[1].alternatives.map((other) => other.id), [12, 7]);
assert.deepEqual(idsOf(tokens), [3, 12, 7]);
assert.deepEqual(tokensOf(null), []);
assert.deepEqual([null, 0, Math.log(0.95), Math.log(0.5), Math.log(0.001), -9999].map(shadeOf), [null, 0, 0, 2, SHADES.length, SHADES.length]);
assert.deepEqual([" a\n", "", "\t", "b "].map(visible), ["␣a⏎", "∅", "⇥", "b␣"]);
assert.deepEqual([null, 0, Math.log(0.486), -9999].map(percent), ["–", "100.0 %", "48.6 %", "< 0.01 %"]);
assert.ok(Math.abs(perplexity(tokens) - 2) < 1e-9);
assert.equal(perplexity([]), null);

// Turns are a tree; the newest way down is shown.
const turn = (id, parent, role, text, more = {}) => ({ id, parent, role, text, created: Number(id), end: "stop", ...more });
const turns = [
  turn("1", null, "user", "Hé?"),
  turn("2", "1", "assistant", "First."),
  turn("3", "1", "assistant", "Second."),
  turn("4", "3", "user", "And?"),
];
const tree = new Map(turns.map((one) => [one.id, one]));
assert.deepEqual(pathTo(tree, "4").map(({ id }) => id), ["1", "3", "4"]);
assert.deepEqual(pathTo(tree, null), []);
assert.deepEqual(siblings(tree, tree.get("2")).map(({ id }) => id), ["2", "3"]);
assert.equal(newestLeaf(tree, null), "4");
assert.equal(newestLeaf(tree, "2"), "2");
assert.equal(titleOf("  What\n is  it? "), "What is it?");
assert.equal(titleOf("longer ".repeat(30)), `${"longer ".repeat(8)}…`);
assert.match(newId(), /^[0-9a-f]{32}$/);
assert.notEqual(newId(), newId());

// Out as a file and in again: nothing is lost, and nothing has its old id.
const record = { ...emptyRecord("talk"), title: "A talk", system: "Be brief.", leaf: "4" };
const same = ({ record: one, turns: its }) => ({
  ...{ title: one.title, system: one.system, shown: pathTo(new Map(its.map((t) => [t.id, t])), one.leaf).map(({ text }) => text) },
  texts: its.map(({ text }) => text),
});
const [back] = fromFile("x.json", toJson([{ record, turns }]));
assert.deepEqual(same(back), same({ record, turns }));
assert.ok(back.turns.every(({ id, conversation }) => !tree.has(id) && conversation === back.record.id && back.record.id !== "talk"));
const hard = ["## You\nmarks\n<!-- turn: user -->\n\\<!-- turn: x", "```\n# code\n## Model\n```\n\n\nend"];
const path = [turn("1", null, "user", hard[0]), turn("2", "1", "assistant", hard[1])];
const [written] = fromFile("x.md", toMarkdown(record, path));
assert.deepEqual(same(written), { title: "A talk", system: "Be brief.", shown: hard, texts: hard });
const [plain] = fromFile("notes.md", "# T\n\n## User\nHi\n\n## Assistant\n\nHello.\n");
assert.deepEqual(same(plain).shown, ["Hi", "Hello."]);
const [listed] = fromFile("m.json", '[{"role":"system","content":"S"},{"role":"user","content":[{"type":"text","text":"Q"}]}]');
assert.deepEqual(same(listed), { title: "Q", system: "S", shown: ["Q"], texts: ["Q"] });
for (const [text, words] of [["nothing here", /no conversation/], ["{", /no JSON/], ['{"a":1}', /neither/], ["[]", /no conversation/]]) {
  assert.throws(() => fromFile("bad", text), words);
}
assert.throws(() => fromFile("bad", toJson([{ record, turns: turns.slice(1) }])), /not there/);

// What is asked: all of it, or what a state does not know; the rest of an answer from its state, or from its text.
const said = (body) => body.messages.map(({ content }) => content);
const whole = { ...record, states: {} };
assert.deepEqual(said(question(whole, pathTo(tree, "4"), {})), ["Be brief.", "Hé?", "Second.", "And?"]);
const saved = { ...record, states: { 3: { id: "state_3", system: "Be brief." } } };
const asked = question(saved, pathTo(tree, "4"), { seed: 1 });
assert.deepEqual([asked.seed, asked.state_id, asked.return_state, said(asked)], [1, "state_3", { update: true }, ["And?"]]);
assert.deepEqual(said(question({ ...saved, system: "Now in verse." }, pathTo(tree, "4"), {})), ["Now in verse.", "And?"]);
assert.deepEqual(said(question(saved, pathTo(tree, "2"), {})), ["Be brief.", "Hé?", "First."], "the state is on another branch");
const lost = [turn("1", null, "user", "Lost?"), turn("2", "1", "assistant", ""), turn("3", "2", "user", "Again")];
assert.deepEqual(said(question({ ...whole, system: "" }, lost, {})), ["Again"]);
const rest = continuation(whole, pathTo(tree, "2"), {});
assert.deepEqual([said(rest).at(-1), rest.continue_final_message, rest.add_generation_prompt], ["First.", true, false]);
const open = { ...record, states: { 3: { id: "state_3", system: "Be brief.", isOpen: true } } };
assert.deepEqual(continuation(open, pathTo(tree, "3"), {}), { messages: [], state_id: "state_3", return_state: { update: true } });
const resumed = continuation(whole, [turn("1", null, "user", "x"), turn("2", "1", "assistant", "y", { resume: "state_r" })], {});
assert.deepEqual(resumed, { messages: [], state_id: "state_r" });
console.log("ok");
