// A text as tokens with their probabilities, from the log-probabilities of a completion.

/** Least probability of each shade, from the expected to the surprising; below the last one: the strongest shade. */
export const SHADES = [0.9, 0.6, 0.3, 0.1, 0.02];

/**
 * The tokens of one piece of a stream: `{id, logprob, alternatives: [{id, logprob}]}`, most likely first. By their ids, for
 * tokens of equal text are not equal, and a text is not always cut as it was.
 */
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  return logprobs.tokens.map((name, number) => ({
    id: idOf(name),
    logprob: logprobs.token_logprobs[number],
    alternatives: Object.entries(logprobs.top_logprobs?.[number] ?? {})
      .map(([other, logprob]) => ({ id: idOf(other), logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

/** `token_id:7` is 7. */
function idOf(name) {
  return Number(name.replace("token_id:", ""));
}

/** Every id in some tokens, once. */
export function idsOf(tokens) {
  return [...new Set(tokens.flatMap((token) => [token.id, ...token.alternatives.map((other) => other.id)]))];
}

/** 0: as expected ... SHADES.length: a surprise; null: nothing is known of it. */
export function shadeOf(logprob) {
  if (logprob === null || logprob === undefined) return null;
  const probability = Math.exp(logprob);
  const shade = SHADES.findIndex((least) => probability >= least);
  return shade < 0 ? SHADES.length : shade;
}

/** A token as it can be seen: white space has signs of its own. */
export function visible(text) {
  if (text === "") return "∅";
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣");
}

export function percent(logprob) {
  if (logprob === null) return "–";
  const value = 100 * Math.exp(logprob);
  if (value < 0.01) return "< 0.01 %";
  return `${value.toFixed(value >= 99.95 || value >= 10 ? 1 : 2)} %`;
}

/** Perplexity of the tokens whose log-probability is known; null: of none. */
export function perplexity(tokens) {
  const known = tokens.filter((token) => token.logprob !== null).map((token) => token.logprob);
  if (known.length === 0) return null;
  return Math.exp(-known.reduce((sum, logprob) => sum + logprob, 0) / known.length);
}
