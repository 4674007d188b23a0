// Puts the page together.

import { Api } from "./api.mjs";
import { ChatView } from "./chat_view.mjs";
import { Connection, storedKey } from "./connection.mjs";
import { Conversation } from "./conversation.mjs";
import { find, tell } from "./dom.mjs";
import { Drafts } from "./drafts.mjs";
import { Drawer } from "./drawer.mjs";
import { ListView } from "./list_view.mjs";
import { MemoryView } from "./memory_view.mjs";
import { inTurn } from "./rich.mjs";
import { Settings } from "./settings.mjs";
import { StatesView } from "./states_view.mjs";
import { openStore } from "./store.mjs";
import { TokensView } from "./tokens_view.mjs";
import { newId } from "./tree.mjs";

const TAB = "dijiang.tab";
const LAST_SYSTEM = "system";
const PURGED_AFTER_MS = 86_400_000;
const TABS = ["chat", "tokens"];

// This module lies in playground/ beside the page, under whatever path a proxy puts them.
const api = new Api(new URL("..", import.meta.url), storedKey);
const store = await openStore();
const tab = sessionStorage.getItem(TAB) ?? newId();
sessionStorage.setItem(TAB, tab);
let lastSystem = (await store.setting(LAST_SYSTEM)) ?? "";
const problem = (error) => tell(find("chat-error"), new Error(`This browser could not store it: ${error.message}`));

const memory = new MemoryView();
const settings = new Settings(store);
const drawer = new Drawer();
const connection = new Connection(api, {
  ready({ model, capacity }) {
    memory.capacity = capacity;
    settings.defaults = model.default_sampling ?? {};
    chat.isReady = true;
    tokens.isReady = true;
    states.refresh();
  },
  away() {
    chat.isReady = false;
    tokens.isReady = false;
  },
});
const render = inTurn((text) => api.render(text));
const failed = (error, { isNoted }) => {
  connection.take(error);
  if (!isNoted && error.status !== 401) tell(find("chat-error"), error);
};
const drafts = await Drafts.load(store, tab);
const chat = new ChatView({
  drafts,
  memory,
  render,
  on: { failed, changed, started: ({ record }) => record.id === chat.conversation.record.id && place(record.id), forked: open },
});
const list = new ListView(store, { open, begin, changed: talkChanged });
const states = new StatesView(api, chat, { failed, adopt, open, find: ofState });
const tokens = new TokensView(api, memory, failed);

function fresh(system = "") {
  return new Conversation(api, store, { tab, system, onProblem: problem });
}

/** The address says which conversation is shown, for reloads, new tabs and the way back. */
function place(id) {
  const hash = id === null ? "" : `#talk-${id}`;
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
  list.current = id;
}

/** Counts what was chosen: whoever chooses again meanwhile does not want the former any more. */
let choice = 0;

async function open(id) {
  const mine = ++choice;
  const running = chat.running(id);
  const conversation = running ?? fresh();
  const isStored = running !== undefined || (await conversation.open(id));
  if (mine !== choice) return undefined;
  if (!isStored) return begin();
  place(id);
  chat.open(conversation);
  drawer.close();
  return states.refresh();
}

/** Shows an empty conversation at once: what is typed next belongs to it. */
async function begin() {
  choice += 1;
  place(null);
  chat.open(fresh(lastSystem));
  drawer.close();
  if (!drawer.isDrawer) find("question").focus();
  await states.refresh();
}

async function adopt(state) {
  const conversation = fresh();
  await conversation.adopt(state);
  await open(conversation.record.id);
}

/** The conversation in this browser that goes by a state; null: none. */
async function ofState(id) {
  const all = await store.conversations();
  return all.find(({ states: kept }) => Object.values(kept).some((one) => one.id === id)) ?? null;
}

async function changed() {
  list.draw();
  await states.refresh();
}

/** A conversation has another name, or is gone: here, or in another tab. */
async function talkChanged(id) {
  list.draw();
  const shown = chat.conversation;
  if (shown === undefined || id !== shown.record.id || chat.isBusy) return;
  const record = await store.conversation(id);
  if (!record || record.deleted !== null) return begin();
  await shown.reread();
  chat.draw();
}

function showHash() {
  const id = /^#talk-(\w+)$/.exec(location.hash)?.[1];
  return id === undefined ? begin() : open(id);
}

function showTab(name) {
  for (const other of TABS) {
    const isShown = other === name;
    find(`panel-${other}`).hidden = !isShown;
    const button = find(`tab-${other}`);
    button.setAttribute("aria-selected", String(isShown));
    button.tabIndex = isShown ? 0 : -1;
  }
  if (name === "chat") chat.showMemory();
}

for (const name of TABS) {
  find(`tab-${name}`).addEventListener("click", () => showTab(name));
  find(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = TABS[(TABS.indexOf(name) + 1) % TABS.length];
    showTab(other);
    find(`tab-${other}`).focus();
  });
}
find("top-new").addEventListener("click", begin);
find("system").addEventListener("input", () => {
  lastSystem = find("system").value.trim();
  store.setSetting(LAST_SYSTEM, lastSystem).catch(problem);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || find("asker").open || event.defaultPrevented) return;
  if (drawer.close()) return;
  chat.stop();
  tokens.stop();
});
addEventListener("popstate", showHash);
store.onChange(talkChanged);
find("not-kept").hidden = store.lasts;
navigator.storage?.persist?.().catch(() => {}); // so that it is not the first to go when the disk is full
await settings.load();
await showHash();
store.purge(Date.now() - PURGED_AFTER_MS).then(() => drafts.purge()).catch(problem);
connection.connect();
