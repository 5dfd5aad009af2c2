// The settings dialog, and what of it goes into a request. What is left empty is the server's to choose.

import { $ } from "./dom.js";
import { inLanguage, number, setLanguage } from "./i18n.js";
import { preference, setPreference } from "./store.js";

const NUMBERS = [
  "max_tokens",
  "seed",
  "top_p",
  "top_k",
  "min_p",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
];

/** Of a request's body. */
export function sampling() {
  const body = { temperature: preference("temperature", 0) };
  for (const name of NUMBERS) {
    const value = preference(name, null);
    if (value !== null) body[name] = value;
  }
  const stop = preference("stop", "").split("\n").filter(Boolean);
  return stop.length ? { ...body, stop } : body;
}

export const systemPrompt = () => preference("system", "").trim();
export const apiKey = () => preference("key", "");

/** Show the dialog; with `keyWanted` at the field for the key. */
export function openSettings(keyWanted = false) {
  $("settings").showModal();
  if (keyWanted) $("set-key").focus();
}

/** Connect the fields; `onKey` is called when another key was entered. */
export function startSettings(onKey) {
  const dialog = $("settings");
  $("open-settings").addEventListener("click", () => openSettings());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  text("system", "change");
  text("stop", "change");
  text("key", "change", onKey);
  for (const name of NUMBERS) {
    const field = $(`set-${name}`);
    field.addEventListener("change", () => {
      if (!field.reportValidity()) return;
      setPreference(name, field.value === "" ? null : Number(field.value));
    });
  }
  const temperature = $("set-temperature");
  temperature.addEventListener("input", () => {
    setPreference("temperature", Number(temperature.value));
    showTemperature();
  });
  $("set-language").addEventListener("change", (event) => setLanguage(event.target.value));
  $("set-theme").addEventListener("change", (event) => {
    setPreference("theme", event.target.value);
    showTheme();
  });
  $("reset").addEventListener("click", () => {
    for (const name of [...NUMBERS, "stop", "system", "temperature"]) setPreference(name, undefined);
    show();
  });
  show();
  inLanguage(showTemperature);
}

function text(name, event, then = () => {}) {
  const field = $(`set-${name}`);
  field.addEventListener(event, () => {
    setPreference(name, field.value);
    then();
  });
}

function show() {
  for (const name of ["system", "stop", "key"]) $(`set-${name}`).value = preference(name, "") ?? "";
  for (const name of NUMBERS) $(`set-${name}`).value = preference(name, null) ?? "";
  $("set-temperature").value = preference("temperature", 0);
  $("set-language").value = preference("language", "auto");
  $("set-theme").value = preference("theme", "auto");
  showTemperature();
  showTheme();
}

function showTemperature() {
  $("temperature-shown").textContent = number(preference("temperature", 0), 2);
}

function showTheme() {
  const theme = preference("theme", "auto");
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

