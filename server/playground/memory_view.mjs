// The card that sets the state, of constant size, beside the cache that it replaces.

import { find, svg } from "./dom.mjs";
import { bytes, count, duration, memory, memorySentence } from "./measure.mjs";

const [WIDTH, HEIGHT, BOTTOM] = [330, 132, 18];

export class MemoryView {
  #capacity = null;
  #tokens = 0;

  /** `capacity`: what the server says about room and sizes. */
  set capacity(capacity) {
    this.#capacity = capacity;
    this.#draw();
  }

  set tokens(tokens) {
    this.#tokens = tokens;
    this.#draw();
  }

  /** What an answer has cost so far; null: there is none. */
  show(stats) {
    find("fact-cached").textContent = stats?.cached == null ? "–" : count(stats.cached);
    find("fact-first").textContent = duration(stats?.first ?? null);
    find("fact-rate").textContent = stats?.rate == null ? "–" : stats.rate.toFixed(1);
  }

  #draw() {
    if (this.#capacity === null) return;
    const now = memory(this.#tokens, this.#capacity);
    find("fact-tokens").textContent = count(now.tokens);
    find("state-bytes").textContent = bytes(now.state);
    find("cache-bytes").textContent = bytes(now.cache);
    find("memory-sentence").textContent = memorySentence(now);
    find("chart").replaceChildren(chart(now, this.#capacity));
  }
}

function chart(now, capacity) {
  const crossing = Number.isFinite(now.crossing) ? now.crossing : 1000;
  const most = Math.max(2.5 * crossing, 1.25 * now.tokens);
  const top = 1.08 * Math.max(memory(most, capacity).cache, 1.5 * now.state);
  const x = (tokens) => (WIDTH * tokens) / most;
  const y = (size) => (HEIGHT - BOTTOM) * (1 - size / top);
  const end = memory(most, capacity);
  const label = `At ${count(now.tokens)} tokens: state ${bytes(now.state)}, KV cache ${bytes(now.cache)}.`;
  const line = (name, from, to) =>
    svg("path", { class: `line ${name}`, d: `M${x(from[0])} ${y(from[1])}L${x(to[0])} ${y(to[1])}` });
  return svg(
    "svg",
    { viewBox: `0 -4 ${WIDTH} ${HEIGHT + 4}`, role: "img", "aria-label": label },
    svg("path", { class: "axis", d: `M0 ${HEIGHT - BOTTOM}H${WIDTH}` }),
    line("there", [0, 0], [most, end.cache]),
    line("here", [0, now.state], [most, now.state]),
    svg("path", { class: "now", d: `M${x(now.tokens)} 0V${HEIGHT - BOTTOM}` }),
    dot("there", x(now.tokens), y(now.cache)),
    dot("here", x(now.tokens), y(now.state)),
    text("0", 0, "start"),
    text(`${count(most)} tokens`, WIDTH, "end"),
  );
}

function dot(name, x, y) {
  return svg("circle", { class: name, cx: x, cy: y, r: 4.5 });
}

function text(words, x, anchor) {
  return svg("text", { x, y: HEIGHT - 4, "text-anchor": anchor }, words);
}
