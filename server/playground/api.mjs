// The server's public HTTP API: what this page asks for, any program may.

import { readEvents } from "./sse.mjs";

/** An answer that is no success, in the words of the server. */
export class ApiError extends Error {
  /** `status`: 0 where there was no answer; `stateId`: from where an answer that was cut off can be continued. */
  constructor(message, { status = 0, code = null, stateId = null } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, stateId });
  }

  /** Whether the same request may work a little later. */
  get isPassing() {
    return this.status === 0 || this.status === 502 || this.status === 503 || this.status === 504;
  }
}

export class Api {
  #base;
  #key;

  /** `base`: address of the page, whatever path it lies under; `key`: a function that gives the API key, or "". */
  constructor(base, key) {
    this.#base = base;
    this.#key = key;
  }

  models() {
    return this.#json("v1/models");
  }

  capacity() {
    return this.#json("v1/capacity");
  }

  /** A text (Markdown) as nodes, see rich.mjs. */
  render(text, signal) {
    return this.#json("playground/markdown", { json: { text }, signal });
  }

  /** The text of tokens, whole (`prompt`) and one by one (`token_texts`). */
  textOf(tokens) {
    return this.#json("detokenize", { json: { tokens, return_token_texts: true } });
  }

  /** Chunks of an answer as they come, usage in each of them. */
  chat(body, signal) {
    return this.#stream("v1/chat/completions", body, signal);
  }

  complete(body, signal) {
    return this.#stream("v1/completions", body, signal);
  }

  /** Every saved state, newest first. */
  async states() {
    const all = [];
    for (let after = ""; ; ) {
      const page = await this.#json(`v1/states?limit=100${after && `&after=${encodeURIComponent(after)}`}`);
      all.push(...page.data);
      if (!page.has_more) return all;
      after = page.next_cursor;
    }
  }

  state(id) {
    return this.#json(stateUrl(id));
  }

  createState(messages, name) {
    return this.#json("v1/states", { json: { messages, name } });
  }

  forkState(id, { name, point }) {
    return this.#json(stateUrl(id, "/fork"), { json: { name, point } });
  }

  markState(id, name) {
    return this.#json(stateUrl(id, "/points"), { json: { name } });
  }

  rewindState(id, point) {
    return this.#json(stateUrl(id, "/rewind"), { json: { point } });
  }

  deleteState(id) {
    return this.#json(stateUrl(id), { method: "DELETE", keepalive: true }); // a page that is left may ask for it
  }

  /** The file of a state, as a Blob. */
  async exportState(id) {
    return (await this.#request(stateUrl(id, "/export"))).blob();
  }

  importState(file, name) {
    const headers = { "content-type": "application/octet-stream" };
    const query = name ? `?name=${encodeURIComponent(name)}` : "";
    return this.#json(`v1/states/import${query}`, { method: "POST", body: file, headers });
  }

  async #json(path, options) {
    return (await this.#request(path, options)).json();
  }

  async #request(path, { method, json, body, headers = {}, signal, keepalive } = {}) {
    const key = this.#key();
    const sent = { ...headers };
    if (key) sent.authorization = `Bearer ${key}`;
    if (json !== undefined) sent["content-type"] = "application/json";
    const response = await fetch(new URL(path, this.#base), {
      method: method ?? (json === undefined ? "GET" : "POST"),
      headers: sent,
      body: json === undefined ? body : JSON.stringify(json),
      credentials: "omit",
      keepalive,
      signal,
    }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached.");
    });
    if (!response.ok) throw await errorOf(response);
    return response;
  }

  async *#stream(path, body, signal) {
    const options = { include_usage: true, continuous_usage_stats: true };
    const response = await this.#request(path, {
      json: { ...body, stream: true, stream_options: options },
      signal,
    });
    for await (const { data } of eventsOf(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, { code: chunk.error.code, stateId: chunk.error.state_id ?? null });
      yield chunk;
    }
    throw cutOff();
  }
}

async function* eventsOf(response) {
  try {
    yield* readEvents(response.body);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw cutOff();
  }
}

function cutOff() {
  return new ApiError("The connection ended in the middle of the answer.");
}

function stateUrl(id, more = "") {
  return `v1/states/${encodeURIComponent(id)}${more}`;
}

async function errorOf(response) {
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `The server answered with status ${response.status}.`;
  const { code = null, state_id: stateId = null } = told?.error ?? {};
  return new ApiError(message, { status: response.status, code, stateId });
}
