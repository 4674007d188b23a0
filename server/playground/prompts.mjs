// What is asked of the server for a turn, and what becomes of an answer piece by piece.

/** Where a state is that came from elsewhere: before every turn. */
export const ROOT = "root";

/** The saved state that is furthest down a path: `{turn, id, system, isOpen}`; null: there is none. */
export function stateOn(record, path) {
  const turn = path.findLast(({ id }) => record.states[id] !== undefined)?.id ?? ROOT;
  const found = record.states[turn];
  return found === undefined ? null : { turn, ...found };
}

/** The body that asks for an answer at the end of a path. */
export function question(record, path, options) {
  const at = stateOn(record, path);
  return { ...options, messages: messagesOf(record, path, at), ...stateFields(at) };
}

/** The body that asks for the rest of an answer: from its state where the server has one, else from its text. */
export function continuation(record, path, options) {
  const [at, answer] = [stateOn(record, path), path.at(-1)];
  if (answer.resume) return { ...options, messages: [], state_id: answer.resume };
  if (at?.turn === answer.id && at.isOpen) return { ...options, messages: [], ...stateFields(at) };
  const how = { continue_final_message: true, add_generation_prompt: false };
  return { ...options, messages: messagesOf(record, path, at), ...how, ...stateFields(at) };
}

/** What comes after a state, or all of it. */
export function messagesOf(record, path, at) {
  const begin = at === null ? 0 : path.findIndex((turn) => turn.id === at.turn) + 1;
  const isNew = record.system !== "" && (at === null || at.system !== record.system);
  const system = isNew ? [{ role: "system", content: record.system }] : [];
  return [...system, ...answered(path.slice(begin)).map((turn) => ({ role: turn.role, content: turn.text }))];
}

/** Without messages that have got no answer and are not the last. */
function answered(path) {
  const isLost = (turn) => turn?.role === "assistant" && turn.text === "";
  return path.filter((turn, number) => !isLost(turn) && !(isLost(path[number + 1]) && path[number + 2]));
}

function stateFields(at) {
  return at === null ? {} : { state_id: at.id, return_state: { update: true } };
}

/** Adds a chunk of a stream to an answer. */
export function take(answer, chunk) {
  const choice = chunk.choices[0];
  answer.thought += choice?.delta.reasoning_content ?? "";
  answer.text += choice?.delta.content ?? "";
  if (choice?.delta.content) delete answer.resume; // that state is behind it now
  if (choice?.finish_reason) answer.end = choice.finish_reason === "length" ? "length" : "stop";
  if (choice?.state_id) answer.stateId = choice.state_id;
  if (chunk.usage) answer.total = chunk.usage.total_tokens;
}

/** Notes why an answer has ended early. */
export function fail(answer, error) {
  answer.end = error.name === "AbortError" ? "stopped" : "error";
  if (answer.end === "error") answer.error = error.message;
  if (error.stateId) answer.resume = error.stateId;
}
