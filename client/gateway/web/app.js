// The page: one conversation at a time, asked of the server and shown as its answer grows.

import { getJson, streamChat } from "./api.js";
import { apiMessages, exportConversation, showChats, title } from "./chats.js";
import { Composer } from "./composer.js";
import { $, el } from "./dom.js";
import { inLanguage, t, translate } from "./i18n.js";
import { MessageView } from "./messages.js";
import { Monitor } from "./monitor.js";
import { startPanels } from "./panels.js";
import { samplePicture } from "./pictures.js";
import { apiKey, openSettings, sampling, startSettings, systemPrompt } from "./settings.js";
import { listConversations, newConversation, removeConversation, saveConversation } from "./store.js";

const NEAR_END = 80; // pixels from the end at which the page follows a growing answer
const LEAST_READS = 4;
const LEAST_MS = 30;

let conversations = [];
let current = newConversation();
let views = new Map();
let growing = null; // { conversation, abort } of the answer that grows
let model = null;
let noticeTimer = 0;

const acts = {
  regenerate(message) {
    if (growing) return;
    if (!message.error && sampling().temperature === 0 && !message.state) notice(t("sameAgain"));
    current.messages = current.messages.slice(0, current.messages.indexOf(message));
    showConversation();
    void answer(current);
  },
  edit(message) {
    if (growing) return;
    current.messages = current.messages.slice(0, current.messages.indexOf(message));
    showConversation();
    composer.set(message.text, message.pictures ?? []);
  },
  openKey: () => openSettings(true),
};

const composer = new Composer({
  onSend(text, pictures) {
    current.messages.push({ role: "user", text, pictures });
    void answer(current);
  },
  onStop: () => growing?.abort.abort(),
  onBad: (name) => notice(t("err_notPicture", { name })),
});

/** Ask the server what follows in a conversation, and let the answer grow in it. */
async function answer(conversation) {
  const message = { role: "assistant", text: "", state: "thinking", figures: null, error: null };
  const abort = new AbortController();
  conversation.messages.push(message);
  conversation.updated = Date.now();
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  growing = { conversation, abort };
  composer.setBusy(true);
  monitor.setQuick(true);
  showConversation();
  toEnd();
  void saveConversation({ ...conversation, messages: conversation.messages.slice(0, -1) });
  try {
    await grow(conversation, message, abort.signal);
  } catch (error) {
    if (error.name === "AbortError") message.state = "stopped";
    else fail(message, error);
  }
  growing = null;
  composer.setBusy(false);
  monitor.setQuick(false);
  $("spoken").textContent = message.error ? "" : t(message.state === "stopped" ? "stopped" : "answered");
  follow(() => views.get(message)?.update());
  await saveConversation(conversation);
}

function fail(message, error) {
  message.state = "failed";
  message.error = { code: error.code ?? "other", message: error.message, retryAfterS: error.retryAfterS ?? 0 };
  if (error.code === undefined) console.error(error);
}

async function grow(conversation, message, signal) {
  const body = { messages: await apiMessages(conversation, systemPrompt()), ...sampling() };
  const sent = performance.now();
  let first = null;
  let last = null;
  let reads = 0;
  let usage = null;
  message.figures = { ttftMs: null, perSecond: null, answerTokens: null, promptTokens: null, byTier: null };
  for await (const { chunk, at } of streamChat(body, apiKey(), signal)) {
    usage = chunk.usage ?? usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    if (at !== last) reads += 1;
    last = at;
    if (first === null) {
      first = last;
      message.state = "answering";
      message.figures.ttftMs = first - sent;
      $("spoken").textContent = t("answering");
    }
    message.text += choice.delta.content ?? "";
    if (choice.finish_reason) message.state = choice.finish_reason === "length" ? "cut" : null;
    follow(() => views.get(message)?.update());
  }
  if (!usage) return;
  const tokens = usage.completion_tokens;
  message.figures.answerTokens = tokens;
  // Tokens that were read in one go were not drawn in one go: an answer that came in few reads has no speed to tell.
  const measured = reads >= LEAST_READS && last - first >= LEAST_MS;
  message.figures.perSecond = measured ? (1000 * (tokens - 1)) / (last - first) : null;
  message.figures.promptTokens = usage.prompt_tokens;
  message.figures.byTier = usage.prompt_tokens_details.cached_tokens_by_tier;
}

/** Do what makes the conversation longer, and stay at its end if that is where the reader is. */
function follow(act) {
  const scroll = $("scroll");
  const near = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_END;
  act();
  if (near) requestAnimationFrame(() => requestAnimationFrame(toEnd));
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function showConversation() {
  const kept = new Map();
  for (const message of current.messages) kept.set(message, views.get(message) ?? new MessageView(message, acts));
  views = kept;
  $("messages").replaceChildren(...[...views.values()].map((view) => view.node));
  const asked = current.messages.findLast((message) => message.role === "user");
  for (const [message, view] of views) view.setNewest(message === asked || message === current.messages.at(-1));
  $("welcome").hidden = current.messages.length > 0;
  $("export").disabled = !current.messages.length;
  showList();
  document.title = current.messages.length ? `${title(current)} – WiCore` : "WiCore";
}

function showList() {
  showChats(conversations, current.id, open, remove);
}

function open(conversation) {
  current = conversation;
  views = new Map();
  panels.closeAll();
  showConversation();
  toEnd();
  composer.focus();
}

async function remove(conversation) {
  if (growing?.conversation === conversation) growing.abort.abort();
  conversations = conversations.filter((each) => each !== conversation);
  if (conversation === current) open(newConversation());
  showList();
  await removeConversation(conversation.id);
  notice(t("removed"), t("undo"), async () => {
    conversations = [...conversations, conversation].sort((a, b) => b.updated - a.updated);
    await saveConversation(conversation);
    open(conversation);
  });
}

/** A word at the edge of the page, for a while; with something that can be done about it. */
function notice(text, label = null, act = null) {
  clearTimeout(noticeTimer);
  const button = label && el("button", { type: "button" }, label);
  button?.addEventListener("click", () => {
    $("notice").replaceChildren();
    void act();
  });
  $("notice").replaceChildren(el("p", {}, text), ...(button ? [button] : []));
  noticeTimer = setTimeout(() => $("notice").replaceChildren(), 7000);
}

async function showModel(first) {
  try {
    const models = await getJson("v1/models", apiKey());
    model = models.data[0].id;
    $("model").textContent = model;
  } catch (error) {
    if (error.code !== "invalid_api_key") setTimeout(showModel, 3000, first);
    else if (first) openSettings(true);
  }
}

async function showSamples() {
  const picture = await samplePicture();
  $("sample").src = URL.createObjectURL(picture.blob);
  inLanguage(() => {
    $("sample").alt = t("sample");
    const buttons = t("trySample").map((question) => {
      const button = el("button", { type: "button" }, question);
      button.addEventListener("click", () => {
        if (growing) return;
        current.messages.push({ role: "user", text: question, pictures: [picture] });
        void answer(current);
      });
      return button;
    });
    $("samples").replaceChildren(...buttons);
  });
}

const monitor = new Monitor(apiKey);
const panels = startPanels((format) => exportConversation(current, systemPrompt(), model, format));
startSettings(() => {
  void showModel(false);
  void monitor.ask();
});
$("new-chat").addEventListener("click", () => open(newConversation()));
translate();
void showModel(true);
void showSamples();
conversations = await listConversations();
inLanguage(() => {
  views = new Map();
  showConversation();
});
void monitor.ask();
composer.focus();
