// What slides in on narrow screens, and the menu for saving a conversation.

import { $ } from "./dom.js";

const NAMES = ["chats", "live"];

/** Connect them; `onExport(format)` is called when a conversation is to be saved. */
export function startPanels(onExport) {
  for (const name of NAMES) {
    for (const button of document.querySelectorAll(`[data-open=${name}]`)) {
      button.addEventListener("click", () => set(name, !$(name).classList.contains("open"), button));
    }
    document.querySelector(`[data-close=${name}]`).addEventListener("click", () => set(name, false));
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && closeAll());
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".side.open, [data-open]")) for (const name of NAMES) set(name, false);
    if (!event.target.closest(".menu")) showMenu(false);
  });
  $("export").addEventListener("click", () => showMenu($("export-menu").hidden));
  for (const item of document.querySelectorAll("[data-export]")) {
    item.addEventListener("click", () => {
      showMenu(false);
      $("export").focus();
      void onExport(item.dataset.export);
    });
  }
  return { closeAll };
}

function closeAll() {
  for (const name of NAMES) set(name, false);
  showMenu(false);
}

function set(name, open, opener = document.querySelector(`[data-open=${name}]`)) {
  const panel = $(name);
  if (panel.classList.contains("open") === open) return;
  const hadFocus = panel.contains(document.activeElement);
  panel.classList.toggle("open", open);
  opener.setAttribute("aria-expanded", String(open));
  if (open) panel.focus();
  else if (hadFocus) opener.focus();
}

function showMenu(open) {
  if ($("export-menu").hidden === !open) return;
  const inside = $("export-menu").contains(document.activeElement);
  $("export-menu").hidden = !open;
  $("export").setAttribute("aria-expanded", String(open));
  if (open) $("export-menu").querySelector("button").focus();
  else if (inside) $("export").focus();
}
