// The page's elements. Children that are strings become text, never markup.

export function find(id) {
  return document.getElementById(id);
}

/** `h("button", {class: "quiet", onclick}, "Text")`: functions become listeners, everything else an attribute. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Shows a problem, or takes the last one away. */
export function tell(element, error) {
  element.hidden = error === null;
  element.textContent = error === null ? "" : error.message;
}

/** Asks for a text in a dialog; null: cancelled. */
export function ask({ title, hint = "", label, value = "", secret = false, ok = "OK" }) {
  const [dialog, input] = [find("asker"), find("asker-value")];
  find("asker-title").textContent = title;
  find("asker-hint").textContent = hint;
  find("asker-label").textContent = label;
  find("asker-ok").textContent = ok;
  input.type = secret ? "password" : "text";
  input.value = value;
  dialog.showModal();
  input.select();
  return new Promise((resolve) => {
    const end = (answer) => {
      closing.abort();
      if (dialog.open) dialog.close();
      input.value = "";
      resolve(answer);
    };
    const closing = new AbortController();
    const { signal } = closing;
    find("asker-form").addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        end(input.value.trim());
      },
      { signal },
    );
    find("asker-cancel").addEventListener("click", () => end(null), { signal });
    dialog.addEventListener("close", () => end(null), { signal });
  });
}

/** A button that puts a text on the clipboard and says so. */
export function copyButton(name, text) {
  const button = h("button", { type: "button", class: "quiet" }, name);
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = name), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // pages that did not come over TLS have no clipboard
  }
}

function copyBySelection(text) {
  const field = h("textarea", { class: "hidden", "aria-hidden": "true" });
  field.value = text;
  const [focused, place] = [document.activeElement, document.querySelector("dialog[open]") ?? document.body];
  place.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isDone;
}

/** Offers a file for saving. */
export function download(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  h("a", { href: url, download: name.replace(/[^\p{L}\p{N} ._-]+/gu, "_").slice(0, 80) }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Says that something is done, and how to take it back; `onEnd` when nobody did. */
export function offerUndo(message, onUndo, onEnd = () => {}, seconds = 10) {
  const toast = h("div", { class: "toast" }, h("span", {}, message));
  const end = (action) => {
    clearTimeout(timer);
    removeEventListener("pagehide", finish);
    toast.remove();
    action();
  };
  const finish = () => end(onEnd);
  const timer = setTimeout(finish, 1000 * seconds);
  addEventListener("pagehide", finish);
  toast.append(h("button", { type: "button", onclick: () => end(onUndo) }, "Undo"));
  find("toasts").append(toast);
}
