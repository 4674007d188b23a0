// Conversations as files: JSON keeps every branch, Markdown the way that is shown.

import { newId, titleOf } from "./tree.mjs";

const FORMAT = "dijiang-conversations";
const ROLES = { user: "You", assistant: "Model", system: "System" };
const MARK = /^<!-- turn: (user|assistant|system) -->$/;
const HEADING = /^## (You|User|Human|Model|Assistant|System)\s*$/i;
const SPEAKERS = { you: "user", user: "user", human: "user", model: "assistant", assistant: "assistant", system: "system" };
const KEPT = ["id", "parent", "role", "text", "thought", "created", "end", "stats"];

/** `talks`: `{record, turns}` each. */
export function toJson(talks) {
  const conversations = talks.map(({ record, turns }) => ({
    title: record.title,
    system: record.system,
    created: record.created,
    updated: record.updated,
    leaf: record.leaf,
    turns: turns.map((turn) => Object.fromEntries(KEPT.filter((key) => turn[key] !== undefined).map((key) => [key, turn[key]]))),
  }));
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

export function toMarkdown(record, path) {
  const said = [...(record.system ? [{ role: "system", text: record.system }] : []), ...path];
  const parts = said.map(({ role, text }) => `<!-- turn: ${role} -->\n## ${ROLES[role]}\n\n${escaped(text)}\n`);
  return `# ${record.title}\n\n${parts.join("\n")}`;
}

/** `[{record, turns}]` of a file, under new ids: nothing that is there is overwritten. */
export function fromFile(name, text, now = Date.now()) {
  const isJson = /^\s*[[{]/.test(text);
  const found = isJson ? fromJson(text) : [fromMarkdown(text)];
  const talks = found.filter(({ turns }) => turns.length > 0).map((talk) => renewed(talk, name, now));
  if (talks.length === 0) throw new Error(`${name}: there is no conversation in this file.`);
  return talks;
}

function fromJson(text) {
  let told;
  try {
    told = JSON.parse(text);
  } catch (error) {
    throw new Error(`This file is no JSON: ${error.message}`);
  }
  if (told.format === FORMAT) return told.conversations.map(checked);
  const messages = Array.isArray(told) ? told : told.messages;
  if (!Array.isArray(messages)) throw new Error(`This JSON is neither of the format ${FORMAT} nor a list of messages.`);
  return [fromMessages(messages.map(({ role, content }) => ({ role, text: wordsOf(content) })), "")];
}

function wordsOf(content) {
  return Array.isArray(content) ? content.map((part) => part.text ?? "").join("") : String(content ?? "");
}

function checked({ title, system, leaf, turns, created }) {
  const isTurn = (turn) => ["user", "assistant"].includes(turn.role) && typeof turn.text === "string" && turn.id;
  if (!Array.isArray(turns) || !turns.every(isTurn)) throw new Error("A conversation in this file is not complete.");
  const byId = new Map(turns.map((turn) => [turn.id, turn]));
  for (const turn of turns) {
    let [above, steps] = [turn, 0];
    while (above && above.parent !== null && steps++ < turns.length) above = byId.get(above.parent);
    if (above?.parent !== null) throw new Error("A turn in this file follows one that is not there.");
  }
  return { title, system, leaf, turns, created };
}

function fromMarkdown(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const isMarked = lines.some((line) => MARK.test(line));
  const title = /^# (.+)$/.exec(lines[0])?.[1].trim() ?? "";
  const said = [];
  let hasMark = false;
  for (const line of lines) {
    const role = isMarked ? MARK.exec(line)?.[1] : SPEAKERS[HEADING.exec(line)?.[1].toLowerCase()];
    if (role) said.push({ role, lines: [] });
    else if (hasMark && HEADING.test(line)) hasMark = false;
    else said.at(-1)?.lines.push(line);
    if (role) hasMark = isMarked;
  }
  return fromMessages(said.map((part) => ({ role: part.role, text: unescaped(part.lines.join("\n")) })), title);
}

function fromMessages(messages, title) {
  const system = messages.filter(({ role }) => role === "system").map(({ text }) => text).join("\n\n");
  const turns = [];
  for (const { role, text } of messages) {
    if (role !== "user" && role !== "assistant") continue;
    const created = turns.length;
    turns.push({ id: String(created), parent: turns.at(-1)?.id ?? null, role, text, created, end: "stop" });
  }
  return { title, system, turns, leaf: turns.at(-1)?.id ?? null };
}

function renewed({ title, system, leaf, turns, created }, name, now) {
  const ids = new Map(turns.map((turn) => [turn.id, newId()]));
  const record = {
    ...emptyRecord(newId(), now),
    title: title || titleOf(turns[0].text) || name,
    system: system ?? "",
    created: created ?? now,
    leaf: ids.get(leaf) ?? ids.get(turns.at(-1).id),
  };
  const pick = (turn) => Object.fromEntries(KEPT.filter((key) => turn[key] !== undefined).map((key) => [key, turn[key]]));
  const placed = (turn) => ({ id: ids.get(turn.id), parent: ids.get(turn.parent) ?? null, conversation: record.id });
  return { record, turns: turns.map((turn) => ({ thought: "", ...pick(turn), ...placed(turn), run: newId() })) };
}

/**
 * A conversation without turns. `leaf`: the end that was shown last; `states`: saved states, `{id, system, isOpen}`, by the turn
 * at whose end they are (`root`: before all; `isOpen`: in the middle of an answer); `points`: for each of them, turns by the name of a point; `isPartial`: what was
 * said before the first turn is known by a state alone.
 */
export function emptyRecord(id, now = Date.now()) {
  const empty = { title: "", hasName: false, system: "", leaf: null, states: {}, points: {} };
  return { id, created: now, updated: now, deleted: null, isPartial: false, ...empty };
}

/** A line of a text that looks like a mark of ours gets a backslash. */
function escaped(text) {
  return text.replace(/^(\\*<!-- turn: )/gm, "\\$1");
}

function unescaped(text) {
  return text.replace(/^\\(\\*<!-- turn: )/gm, "$1").replace(/^\n+|\n+$/g, "");
}
