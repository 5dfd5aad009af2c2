// One message on the page: its pictures, its text, and for an answer how it went.

import { $, copyFrom, el, icon, svg } from "./dom.js";
import { duration, known, number, t } from "./i18n.js";
import { MarkdownView } from "./markdown.js";

export const TIERS = ["device", "host", "nvme"];

/**
 * A message: `{ role, text, pictures?, state?, figures?, error? }`. `state` of an answer is thinking, answering, stopped,
 * cut (by its limit), failed, or nothing once it is complete. `acts` are the callbacks copy, regenerate, edit, openKey.
 */
export class MessageView {
  constructor(message, acts) {
    this.message = message;
    this._acts = acts;
    this._text = el("div", { class: "text" });
    this._markdown = message.role === "assistant" ? new MarkdownView(this._text) : null;
    this._foot = el("div", { class: "foot" });
    const name = el("h2", { class: "unseen" }, t(message.role === "user" ? "you" : "model"));
    const said = el("div", { class: "said" }, this._text, this._foot);
    this.node = el("article", { class: `message ${message.role}` }, name, this._pictures(), said);
    this._due = false;
    this._costMs = 0;
    this._draw(true);
  }

  /** Show what the message has become at the next frame; a quarter of the time at most is spent on it. */
  update() {
    if (this._due) return;
    this._due = true;
    setTimeout(() => requestAnimationFrame(() => this._redraw()), 3 * this._costMs);
  }

  _redraw() {
    const begin = performance.now();
    this._due = false;
    this._draw(false);
    this._costMs = performance.now() - begin;
  }

  /** Only the newest answer can be asked for again, and only the newest question edited. */
  setNewest(newest) {
    this.node.classList.toggle("newest", newest);
  }

  _pictures() {
    const pictures = this.message.pictures ?? [];
    if (!pictures.length) return null;
    const shown = pictures.map((picture) => {
      const image = el("img", { src: URL.createObjectURL(picture.blob), alt: t("pictureOf", picture) });
      image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
      return image;
    });
    return el("div", { class: "shown-pictures" }, ...shown);
  }

  _draw(first) {
    const { message } = this;
    if (this._markdown) this._markdown.update(message.text);
    else if (first) this._text.textContent = message.text;
    this._text.hidden = !message.text;
    this.node.classList.toggle("growing", message.state === "answering");
    this._foot.replaceChildren(...(message.role === "user" ? this._askedFoot() : this._answerFoot()));
  }

  _askedFoot() {
    return [this._button("edit", "edit", this._acts.edit, "only-newest")];
  }

  _answerFoot() {
    const { state, error, figures, text } = this.message;
    if (state === "thinking") return [el("p", { class: "thinking soft" }, el("span", { class: "pulse" }), t("thinking"))];
    if (state === "answering") return [];
    const parts = [];
    if (error) parts.push(this._error(error));
    if (state === "cut") parts.push(el("p", { class: "aside soft" }, t("cut")));
    const buttons = [this._button("again", "regenerate", this._acts.regenerate, "only-newest")];
    if (text) buttons.unshift(this._button("copy", "copy", (message, button) => this._copy(button)));
    const row = el("div", { class: "row" }, el("span", { class: "buttons" }, ...buttons));
    if (state === "stopped") row.append(el("span", { class: "soft" }, t("stopped")));
    if (figures) row.append(...figureNodes(figures));
    return [...parts, row];
  }

  _button(drawing, label, act, more = "") {
    const button = el("button", { type: "button", class: `quiet ${more}`, "aria-label": t(label), title: t(label) });
    button.append(icon(drawing));
    button.addEventListener("click", () => act(this.message, button));
    return button;
  }

  async _copy(button) {
    await copyFrom(button, this.message.text);
    $("spoken").textContent = t("copied");
  }

  _error(error) {
    const seconds = error.retryAfterS || 1;
    const wantsKey = error.code === "invalid_api_key";
    const said = known(`err_${error.code}`, "err_other", { seconds });
    const detail = error.message ? el("p", { class: "small soft" }, t("serverSays", { message: error.message })) : null;
    const act = wantsKey ? this._acts.openKey : this._acts.regenerate;
    const button = el("button", { type: "button" }, t(wantsKey ? "openSettings" : "retry"));
    button.addEventListener("click", () => act(this.message));
    const ours = error.code === "unreachable" || error.code === "connection_lost";
    return el("div", { class: "error", role: "alert" }, el("p", {}, said), ours ? null : detail, button);
  }
}

/** Of an answer: `{ ttftMs, perSecond, answerTokens, promptTokens, byTier }`, null where it is not known. */
function figureNodes({ ttftMs, perSecond, answerTokens, promptTokens, byTier }) {
  const nodes = [];
  const figure = (value, words, title = null) =>
    nodes.push(el("span", { class: "figure-pair", title }, el("b", { class: "figure" }, value), ` ${words}`));
  if (ttftMs !== null) figure(duration(ttftMs), t("firstToken"), t("firstTokenTitle"));
  if (perSecond !== null) figure(number(perSecond), t("perSecond"), t("speedTitle"));
  if (answerTokens !== null) nodes.push(el("span", {}, t("answerTokens", { count: number(answerTokens) })));
  if (promptTokens !== null) nodes.push(reuse(promptTokens, byTier ?? {}));
  return nodes;
}

/** How much of the prompt was computed before, and where it was kept. */
function reuse(promptTokens, byTier) {
  const each = TIERS.filter((tier) => byTier[tier]).map((tier) => `${t(`tier_${tier}`)} ${number(byTier[tier])}`);
  const words = each.length ? t("reused", { tiers: each.join(", ") }) : t("reusedNone");
  const bar = svg("svg", { viewBox: "0 0 100 8", class: "reuse", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(svg("rect", { class: "fill-computed", width: 100, height: 8 }));
  let begin = 0;
  for (const tier of TIERS) {
    const width = (100 * (byTier[tier] ?? 0)) / Math.max(1, promptTokens);
    bar.append(svg("rect", { class: `fill-${tier}`, x: begin, width, height: 8 }));
    begin += width;
  }
  const told = el("span", {}, t("promptTokens", { count: number(promptTokens) }), " · ", words);
  return el("span", { class: "reuse-pair" }, bar, told);
}
