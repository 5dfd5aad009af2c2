// The list of conversations, and conversations as files.

import { $, el, icon } from "./dom.js";
import { t } from "./i18n.js";
import { dataUrl } from "./pictures.js";

/** What a conversation is called: how it begins. */
export function title(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  return first?.text.split("\n", 1)[0].slice(0, 80) || t("untitled");
}

/** Draw the list; `onOpen` and `onRemove` are called with a conversation. */
export function showChats(conversations, currentId, onOpen, onRemove) {
  const items = conversations.map((conversation) => {
    const name = title(conversation);
    const current = conversation.id === currentId;
    const open = el("button", { type: "button", class: "chat", "aria-current": current && "true" }, name);
    open.addEventListener("click", () => onOpen(conversation));
    const label = t("remove", { title: name });
    const remove = el("button", { type: "button", class: "quiet", "aria-label": label, title: label }, icon("close"));
    remove.addEventListener("click", () => onRemove(conversation));
    return el("li", { class: current && "current" }, open, remove);
  });
  $("chat-list").replaceChildren(...items);
}

/** A conversation as the API takes it (`messages`), pictures as data URLs. */
export async function apiMessages(conversation, system) {
  const found = system ? [{ role: "system", content: system }] : [];
  for (const message of conversation.messages) {
    if (message.role === "assistant") {
      if (message.text) found.push({ role: "assistant", content: message.text });
      continue;
    }
    const urls = await Promise.all((message.pictures ?? []).map((picture) => dataUrl(picture.blob)));
    const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
    if (message.text) parts.push({ type: "text", text: message.text });
    const last = found.at(-1);
    if (last?.role === "user") last.content.push(...parts); // what was asked before had no answer
    else found.push({ role: "user", content: parts });
  }
  return found;
}

/** Save as a file: "markdown" to read, "json" to send to the API again. */
export async function exportConversation(conversation, system, model, format) {
  const messages = await apiMessages(conversation, system);
  const figures = conversation.messages.filter((each) => each.figures).map((each) => each.figures);
  const text = format === "json" ? JSON.stringify({ model, messages, figures }, null, 2) : markdown(messages);
  const type = format === "json" ? "application/json" : "text/markdown";
  const url = URL.createObjectURL(new Blob([text], { type }));
  const day = new Date(conversation.updated).toISOString().slice(0, 10);
  el("a", { href: url, download: `wicore-${day}-${conversation.id.slice(0, 6)}.${format === "json" ? "json" : "md"}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function markdown(messages) {
  const names = { system: t("systemPrompt"), user: t("you"), assistant: t("model") };
  const body = ({ content }) =>
    typeof content === "string"
      ? content
      : content.map((part) => (part.type === "text" ? part.text : `![](${part.image_url.url})`)).join("\n\n");
  return `${messages.map((message) => `## ${names[message.role]}\n\n${body(message)}`).join("\n\n")}\n`;
}
