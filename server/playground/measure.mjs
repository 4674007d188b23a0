// What an answer costs, in time and in memory; and the words for it.

/** Times one answer. */
export class Stopwatch {
  #begin;
  #first = null;
  #last = null;
  #now;
  #tokens = 0;

  constructor(now = () => performance.now()) {
    this.#now = now;
    this.#begin = now();
  }

  /** `tokens`: how many have come by now. */
  take(tokens) {
    if (tokens <= this.#tokens) return;
    this.#last = this.#now();
    if (this.#first === null) [this.#first, this.#tokensAtFirst] = [this.#last, tokens];
    this.#tokens = tokens;
  }

  #tokensAtFirst = 0;

  /** How many tokens have come. */
  get tokens() {
    return this.#tokens;
  }

  /** Milliseconds to the first token; null before it. */
  get firstMs() {
    return this.#first === null ? null : this.#first - this.#begin;
  }

  /** Tokens a second behind the first ones; null while nothing can be said. */
  get rate() {
    const more = this.#tokens - this.#tokensAtFirst;
    return more > 0 && this.#last > this.#first ? (1000 * more) / (this.#last - this.#first) : null;
  }
}

/** Memory of a conversation here, and what a cache of keys and values would take. */
export function memory(tokens, { state_bytes: state, kv_cache_bytes_per_token: perToken }) {
  const crossing = perToken > 0 ? Math.ceil(state / perToken) : Infinity;
  return { tokens, state, cache: tokens * perToken, crossing, ratio: (tokens * perToken) / state };
}

/** One sentence about it. */
export function memorySentence({ tokens, ratio, crossing }) {
  if (tokens === 0) return "It stays this size, however long the conversation gets.";
  if (ratio >= 1.05) return `A KV cache would be ${times(ratio)} as large by now, and would keep growing.`;
  return `A KV cache would be smaller up to ${count(crossing)} tokens, and grow for ever.`;
}

export function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  let size = number;
  for (; size >= 1000 && unit < units.length - 1; unit++) size /= 1000;
  return `${unit === 0 ? size : size.toFixed(size < 10 ? 2 : 1)} ${units[unit]}`;
}

export function count(number) {
  return Number.isFinite(number) ? Math.round(number).toLocaleString("en") : "∞";
}

export function duration(ms) {
  if (ms === null) return "–";
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function times(ratio) {
  return `${ratio < 10 ? ratio.toFixed(1) : count(ratio)} times`;
}
