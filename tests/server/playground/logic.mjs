// What the playground computes, without a page: run by test_logic.py with the folder of its modules.

import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";

const folder = pathToFileURL(`${process.argv[2]}/`);
const load = (name) => import(new URL(name, folder));
const { EventParser, readEvents } = await load("sse.mjs");
const { parse, parseInline } = await load("markdown.mjs");
const { bytes, count, duration, memory, memorySentence, Stopwatch } = await load("measure.mjs");
const { percent, perplexity, shadeOf, SHADES, tokensOf, visible } = await load("tokens.mjs");

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

// Markdown is data, and markup in it stays text.
const attack = '<img src=x onerror="alert(1)"> [x](javascript:alert(1)) <script>alert(1)</script>';
assert.deepEqual(parse(attack), [{ kind: "paragraph", text: attack }]);
assert.deepEqual(parseInline(attack), [{ kind: "text", text: attack }]);
assert.deepEqual(parse("# A *b* #\ntext\nmore\n\n```js\n<b>\n\n# no\n```\nend"), [
  { kind: "heading", level: 1, text: "A *b*" },
  { kind: "paragraph", text: "text\nmore" },
  { kind: "code", language: "js", text: "<b>\n\n# no" },
  { kind: "paragraph", text: "end" },
]);
assert.deepEqual(parse("```\nnot closed"), [{ kind: "code", language: "", text: "not closed" }]);
assert.deepEqual(parse("- a\n- b\n  more\n\n- c\n3. x\n4. y"), [
  { kind: "list", ordered: false, start: 1, items: ["a", "b\nmore", "c"] },
  { kind: "list", ordered: true, start: 3, items: ["x", "y"] },
]);
assert.deepEqual(parseInline("a **b** `c * d` *e* snake_case_name 2*3*4 **"), [
  { kind: "text", text: "a " },
  { kind: "strong", text: "b" },
  { kind: "text", text: " " },
  { kind: "code", text: "c * d" },
  { kind: "text", text: " " },
  { kind: "em", text: "e" },
  { kind: "text", text: " snake_case_name 2*3*4 **" },
]);
for (const text of ["", "*", "**", "`", "``` ", "_ _", "#", "1.", "-", "\n\n\n", "> q", "a\r\nb"]) parse(text).forEach((b) => parseInline(b.text ?? ""));
const long = "*".repeat(20_000) + "_a".repeat(20_000) + "`".repeat(20_000);
const begin = performance.now();
for (const block of parse(long)) parseInline(block.text ?? "");
assert.ok(performance.now() - begin < 5_000, "no text may stop the page");

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
  tokens: ["The", " cat\n"],
  token_logprobs: [null, Math.log(0.5)],
  top_logprobs: [null, { " dog": Math.log(0.25), " cat\n": Math.log(0.5) }],
};
const tokens = tokensOf(told);
assert.deepEqual(tokens[0], { text: "The", logprob: null, alternatives: [] });
assert.deepEqual(tokens[1].alternatives.map((other) => other.text), [" cat\n", " dog"]);
assert.deepEqual(tokensOf(null), []);
assert.deepEqual([null, 0, Math.log(0.95), Math.log(0.5), Math.log(0.001), -9999].map(shadeOf), [null, 0, 0, 2, SHADES.length, SHADES.length]);
assert.deepEqual([" a\n", "", "\t", "b "].map(visible), ["␣a⏎", "∅", "⇥", "b␣"]);
assert.deepEqual([null, 0, Math.log(0.486), -9999].map(percent), ["–", "100.0 %", "48.6 %", "< 0.01 %"]);
assert.ok(Math.abs(perplexity(tokens) - 2) < 1e-9);
assert.equal(perplexity([]), null);
console.log("ok");
