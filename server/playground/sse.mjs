// Server-sent events (WHATWG HTML, section 9.2.6), from text in any pieces.

export class EventParser {
  #buffer = "";
  #name = "";
  #data = [];

  /** Takes more text; returns the events `{name, data}` that it completes. */
  push(text) {
    this.#buffer += text;
    const events = [];
    for (;;) {
      const end = this.#buffer.search(/\r\n|\n|\r/);
      // A carriage return at the very end may be half of a line break.
      if (end < 0 || (this.#buffer[end] === "\r" && end === this.#buffer.length - 1)) return events;
      const line = this.#buffer.slice(0, end);
      this.#buffer = this.#buffer.slice(end + (this.#buffer.startsWith("\r\n", end) ? 2 : 1));
      const event = this.#take(line);
      if (event !== null) events.push(event);
    }
  }

  #take(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#name = value;
    return null; // comments, such as keep-alives, have an empty field name
  }

  #dispatch() {
    const [name, data] = [this.#name, this.#data];
    [this.#name, this.#data] = ["", []];
    return data.length === 0 ? null : { name: name || "message", data: data.join("\n") };
  }
}

/** The events of a body (a stream of bytes) as they come. */
export async function* readEvents(body) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
