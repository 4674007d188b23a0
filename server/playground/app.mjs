// Puts the page together.

import { Api } from "./api.mjs";
import { ChatView } from "./chat_view.mjs";
import { Conversation, Transcripts } from "./conversation.mjs";
import { ask, find, tell } from "./dom.mjs";
import { MemoryView } from "./memory_view.mjs";
import { StatesView } from "./states_view.mjs";
import { TokensView } from "./tokens_view.mjs";

const KEY = "dijiang.key"; // in the session's storage: gone with the tab, never in an address

// This module lies in playground/ beside the page, under whatever path a proxy puts them.
const api = new Api(new URL("..", import.meta.url), () => sessionStorage.getItem(KEY) ?? "");
const transcripts = new Transcripts(sessionStorage);
const conversation = new Conversation(api, transcripts);
const memory = new MemoryView();
const states = new StatesView(api, conversation, transcripts);
const chat = new ChatView(conversation, memory, () => states.refresh());
const tokens = new TokensView(api, memory);
states.chat = chat;

async function connect() {
  try {
    const [models, capacity] = await Promise.all([api.models(), api.capacity()]);
    find("model").textContent = models.data[0].id;
    memory.capacity = capacity;
    tell(find("chat-error"), null);
    await states.refresh();
  } catch (error) {
    find("model").textContent = error.status === 401 ? "an API key is needed" : "not ready";
    if (error.status === 401) await askForKey();
    else tell(find("chat-error"), error);
  }
}

async function askForKey() {
  if (find("asker").open) return;
  const hint = "It stays in this tab, and is sent to this server alone. Leave it empty to forget it.";
  const key = await ask({ title: "API key", label: "API key", hint, secret: true, ok: "Use" });
  if (key === null) return;
  if (key === "") sessionStorage.removeItem(KEY);
  else sessionStorage.setItem(KEY, key);
  await connect();
}

function show(name) {
  for (const other of ["chat", "tokens"]) {
    const isShown = other === name;
    find(`panel-${other}`).hidden = !isShown;
    const tab = find(`tab-${other}`);
    tab.setAttribute("aria-selected", String(isShown));
    tab.tabIndex = isShown ? 0 : -1;
  }
  if (name === "chat") chat.showMemory();
}

function moveTabs(event) {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const other = event.currentTarget.id === "tab-chat" ? "tokens" : "chat";
  show(other);
  find(`tab-${other}`).focus();
}

for (const name of ["chat", "tokens"]) {
  find(`tab-${name}`).addEventListener("click", () => show(name));
  find(`tab-${name}`).addEventListener("keydown", moveTabs);
}
find("key-open").addEventListener("click", askForKey);
find("settings").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || find("asker").open) return;
  chat.stop();
  tokens.stop();
});
connect();
