// On narrow screens the side panel is a drawer: over the page while it is open, and out of the way of the keyboard else.

import { find } from "./dom.mjs";

const NARROW = matchMedia("(max-width: 68.74rem)");

export class Drawer {
  #isOpen = false;

  constructor() {
    find("menu").addEventListener("click", () => this.#set(!this.#isOpen));
    find("menu-close").addEventListener("click", () => this.close());
    find("shade").addEventListener("click", () => this.close());
    NARROW.addEventListener("change", () => this.#set(false));
    this.#set(false);
  }

  /** Whether the side panel is one at this width. */
  get isDrawer() {
    return NARROW.matches;
  }

  /** True: it was open. */
  close() {
    if (!this.#isOpen) return false;
    this.#set(false);
    find("menu").focus();
    return true;
  }

  #set(isOpen) {
    this.#isOpen = isOpen;
    find("menu").setAttribute("aria-expanded", String(isOpen));
    find("side").classList.toggle("open", isOpen);
    find("shade").hidden = !isOpen;
    find("side").inert = NARROW.matches && !isOpen;
    for (const behind of [find("main"), find("top")]) behind.inert = isOpen;
    if (isOpen) find("menu-close").focus();
  }
}
