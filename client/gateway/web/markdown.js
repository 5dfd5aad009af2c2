// Markdown of answers as nodes. marked reads it into tokens; each becomes an element whose text is set as text, so that
// whatever a model writes, HTML among it, is shown and never run. Pictures and addresses are not loaded: they are links.

import { lexer } from "./vendor/marked.js";
import { copyFrom, el, icon } from "./dom.js";
import { t } from "./i18n.js";

const LINKS = /^(https?:|mailto:)/i;

/**
 * Shows a growing text. What stands before its last two blocks is done with and is not read again, so that a long answer
 * costs no more by the word than a short one; and blocks that did not change stay the nodes they are, so that a
 * selection in them survives.
 */
export class MarkdownView {
  constructor(node) {
    this.node = node;
    this._done = { text: "", blocks: 0 };
    this._shown = [];
  }

  update(text) {
    if (!text.startsWith(this._done.text)) this._done = { text: "", blocks: 0 };
    const tokens = lexer(text.slice(this._done.text.length), { gfm: true, breaks: true });
    const shown = [...this._shown.slice(0, this._done.blocks), ...tokens.filter((token) => token.type !== "space")];
    let same = this._done.blocks;
    while (same < Math.min(shown.length, this._shown.length) && this._shown[same].raw === shown[same].raw) same += 1;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    for (const token of shown.slice(same)) this.node.append(block(token));
    this._shown = shown;
    this._freeze(tokens);
  }

  _freeze(tokens) {
    let last = 2;
    for (let place = tokens.length - 1; place >= 0; place -= 1) {
      if (tokens[place].type !== "space" && last-- === 0) {
        const frozen = tokens.slice(0, place + 1);
        const text = this._done.text + frozen.map((token) => token.raw).join("");
        this._done = { text, blocks: this._done.blocks + frozen.filter((token) => token.type !== "space").length };
        return;
      }
    }
  }
}

function blocks(tokens) {
  return tokens.filter((token) => token.type !== "space").map(block);
}

function block(token) {
  switch (token.type) {
    case "heading":
      return el(`h${Math.min(6, token.depth + 2)}`, {}, ...spans(token.tokens));
    case "paragraph":
      return el("p", {}, ...spans(token.tokens));
    case "text": // of a tight list item
      return el("span", {}, ...(token.tokens ? spans(token.tokens) : [unescape(token.text)]));
    case "code":
      return code(token);
    case "blockquote":
      return el("blockquote", {}, ...blocks(token.tokens));
    case "list":
      return list(token);
    case "table":
      return table(token);
    case "hr":
      return el("hr");
    default: // HTML, and whatever is to come
      return el("p", {}, token.raw.trim());
  }
}

function code(token) {
  const copy = el("button", { type: "button", class: "quiet", "aria-label": t("copyCode"), title: t("copyCode") });
  copy.append(icon("copy"));
  copy.addEventListener("click", () => copyFrom(copy, token.text));
  const head = el("div", { class: "code-head" }, el("span", {}, token.lang ?? ""), copy);
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0" }, el("code", {}, token.text)));
}

function list(token) {
  const items = token.items.map((item) => {
    const box = item.task ? el("input", { type: "checkbox", disabled: true, checked: item.checked }) : null;
    return el("li", {}, box, ...blocks(item.tokens.filter((each) => each.type !== "checkbox")));
  });
  const start = token.ordered && token.start !== 1 ? token.start : null;
  return el(token.ordered ? "ol" : "ul", { start }, ...items);
}

function table(token) {
  const row = (cells, tag) =>
    el("tr", {}, ...cells.map((cell) => el(tag, { class: cell.align && `to-${cell.align}` }, ...spans(cell.tokens))));
  const body = token.rows.map((cells) => row(cells, "td"));
  const whole = el("table", {}, el("thead", {}, row(token.header, "th")), el("tbody", {}, ...body));
  return el("div", { class: "table", tabindex: "0" }, whole);
}

function spans(tokens) {
  return tokens.map(span);
}

function span(token) {
  switch (token.type) {
    case "strong":
      return el("strong", {}, ...spans(token.tokens));
    case "em":
      return el("em", {}, ...spans(token.tokens));
    case "del":
      return el("del", {}, ...spans(token.tokens));
    case "codespan":
      return el("code", {}, token.text);
    case "br":
      return el("br");
    case "link":
    case "image":
      return link(token);
    case "text":
    case "escape":
      return token.tokens ? el("span", {}, ...spans(token.tokens)) : document.createTextNode(unescape(token.text));
    default:
      return document.createTextNode(token.raw);
  }
}

function link(token) {
  const inside = token.type === "link" ? spans(token.tokens) : [token.text || token.href];
  if (!LINKS.test(token.href)) return el("span", {}, ...inside);
  return el("a", { href: token.href, rel: "noopener noreferrer nofollow", target: "_blank" }, ...inside);
}

const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'" };

/** marked leaves some texts escaped for HTML, which ours never become. */
function unescape(text) {
  return text.replace(/&(amp|lt|gt|quot|#39);/g, (entity) => ENTITIES[entity]);
}
