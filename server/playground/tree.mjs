// The turns of a conversation as a tree: regenerating and editing make branches, and one way through it is shown.

/** From the first turn down to this one. */
export function pathTo(turns, leaf) {
  const path = [];
  for (let turn = turns.get(leaf); turn !== undefined; turn = turns.get(turn.parent)) path.push(turn);
  return path.reverse();
}

/** Turns that stand at the same place, this one among them, oldest first. */
export function siblings(turns, turn) {
  return [...turns.values()].filter((other) => other.parent === turn.parent).sort(byAge);
}

/** The newest end below a turn; `null`: of the whole tree. */
export function newestLeaf(turns, from) {
  const children = [...turns.values()].filter((turn) => turn.parent === from).sort(byAge);
  return children.length === 0 ? from : newestLeaf(turns, children.at(-1).id);
}

function byAge(a, b) {
  return a.created - b.created || (a.id < b.id ? -1 : 1);
}

/** What a conversation is called until somebody gives it a name: how its first message begins. */
export function titleOf(text) {
  const line = text.trim().split(/\s+/).join(" ");
  return line.length <= 60 ? line : `${line.slice(0, 60).replace(/\s+\S*$/, "")} …`;
}

/** 128 random bits. Pages that did not come over TLS have no `randomUUID`. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
