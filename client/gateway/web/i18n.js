// The page's language: what was chosen here, else the browser's.

import { preference, setPreference } from "./store.js";
import { WORDS } from "./words.js";

const followers = [];
let language = chosen();

function chosen() {
  const set = preference("language", "auto");
  if (set in WORDS) return set;
  return (navigator.languages ?? [navigator.language]).find((tag) => tag.slice(0, 2) in WORDS)?.slice(0, 2) ?? "en";
}

/** The words of a key, with `{name}` filled in from `values`. */
export function t(key, values = {}) {
  const words = WORDS[language][key];
  if (words === undefined) throw new Error(`no words for ${key} in ${language}`);
  if (typeof words !== "string") return words;
  return words.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Words for a key where there are any, else those of `otherwise`. */
export function known(key, otherwise, values) {
  return t(key in WORDS[language] ? key : otherwise, values);
}

/** Call now and whenever the language changes. */
export function inLanguage(show) {
  followers.push(show);
  show();
}

export function setLanguage(name) {
  setPreference("language", name);
  language = chosen();
  translate();
}

/** Put the words into the page: `data-t` is a text, `data-t-label` a label with a tip, `data-t-hint` a placeholder. */
export function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : language;
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-t-hint]")) node.placeholder = t(node.dataset.tHint);
  for (const node of document.querySelectorAll("[data-t-label]")) {
    node.setAttribute("aria-label", t(node.dataset.tLabel));
    node.title = t(node.dataset.tLabel);
  }
  for (const show of followers) show();
}

/** A number as people of this language write it. */
export function number(value, digits = 0) {
  return new Intl.NumberFormat(document.documentElement.lang, {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  }).format(value);
}

/** Milliseconds, in a unit that suits them. */
export function duration(ms) {
  if (ms === null) return "–";
  if (ms >= 1000) return `${number(ms / 1000, ms < 10_000 ? 2 : 1)} s`;
  return `${number(ms, ms < 10 ? 1 : 0)} ms`;
}

/** Bytes in binary units. */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = value > 0 ? Math.min(units.length - 1, Math.floor(Math.log2(value) / 10)) : 0;
  const shown = value / 2 ** (10 * power);
  return `${number(shown, power && shown < 10 ? 1 : 0)} ${units[power]}`;
}
