// What the server does, asked of /v1/stats and drawn as it changes: often while an answer grows, once a second otherwise,
// and not at all while nobody looks.

import { getJson } from "./api.js";
import { $, el, svg } from "./dom.js";
import { bytes, duration, inLanguage, number, t } from "./i18n.js";
import { TIERS } from "./messages.js";

const QUICK_MS = 300;
const CALM_MS = 1000;
const LOST_MS = 2000;
const KEPT_MS = 60_000;
const WIDTH = 240;
const HEIGHT = 44;
const MAX_CELLS = 64;

export class Monitor {
  /** `key()` gives the API key. */
  constructor(key) {
    this._key = key;
    this._quick = false;
    this._speeds = [];
    this._before = null;
    this._last = null;
    this._timer = 0;
    document.addEventListener("visibilitychange", () => this.ask());
    inLanguage(() => this._draw());
  }

  /** Whether an answer grows now. */
  setQuick(quick) {
    this._quick = quick;
    this.ask();
  }

  /** Ask now, and then again and again. */
  async ask() {
    clearTimeout(this._timer);
    if (document.hidden || this._asking) return;
    this._asking = true;
    try {
      this._take(await getJson("v1/stats", this._key()));
      this._state = "connected";
    } catch (error) {
      this._state = error.code === "invalid_api_key" ? "needsKey" : "lost";
      this._before = null;
    }
    this._asking = false;
    this._draw();
    const pause = this._state !== "connected" ? LOST_MS : this._quick ? QUICK_MS : CALM_MS;
    this._timer = setTimeout(() => this.ask(), pause);
  }

  _take(stats) {
    const now = performance.now();
    const drawn = stats.totals.drawn_tokens;
    if (this._before) {
      const speed = (1000 * (drawn - this._before.drawn)) / (now - this._before.now);
      this._speeds.push({ at: now, speed: Math.max(0, speed) }); // a decoder that was started again counts from zero
    }
    while (this._speeds.length && this._speeds[0].at < now - KEPT_MS) this._speeds.shift();
    this._before = { now, drawn };
    this._last = stats;
  }

  _draw() {
    const state = this._state ?? "connected";
    const connected = state === "connected";
    $("connection").textContent = t(this._state ? state : "live");
    $("connection-hint").hidden = state !== "lost";
    $("connection-hint").textContent = t("lostHint");
    for (const dot of [$("dot"), $("glance-dot")]) dot.className = connected ? "dot" : "dot bad";
    const speed = this._speeds.at(-1)?.speed ?? 0;
    $("glance").textContent = connected ? `${number(speed)} ${t("perSecond")}` : "";
    $("gauges").classList.toggle("old", !connected);
    if (!this._last) return;
    const shown = [this._speed(speed), slots(this._last), queue(this._last), ...tiers(this._last), latency(this._last)];
    if (this._last.gpu_utilization !== null) shown.push(gpu(this._last));
    $("gauges").replaceChildren(...shown);
  }

  _speed(speed) {
    const now = performance.now();
    const most = Math.max(1, ...this._speeds.map((each) => each.speed));
    const x = (at) => WIDTH * (1 - (now - at) / KEPT_MS);
    const y = (value) => HEIGHT - 1 - (HEIGHT - 4) * (value / most);
    const points = this._speeds.map((each) => `${x(each.at).toFixed(1)},${y(each.speed).toFixed(1)}`);
    const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "spark", "aria-hidden": "true" });
    drawing.setAttribute("preserveAspectRatio", "none");
    if (points.length > 1) {
      const [first, last] = [this._speeds[0], this._speeds.at(-1)];
      const area = `${x(first.at)},${HEIGHT} ${points.join(" ")} ${x(last.at)},${HEIGHT}`;
      drawing.append(svg("polygon", { points: area, class: "area" }));
      drawing.append(svg("polyline", { points: points.join(" "), class: "line" }));
    }
    const big = el("div", { class: "big" }, el("b", { class: "figure", id: "speed" }, number(speed)));
    big.append(el("span", { class: "soft" }, t("perSecond")));
    return section("speed", t("last60"), big, drawing);
  }
}

/** A gauge under its name; `told` is its state in words. */
function section(name, told, ...parts) {
  const head = el("div", { class: "head" }, el("h3", {}, t(name)), el("span", { class: "soft figure" }, told ?? ""));
  return el("section", { class: `gauge ${name}` }, head, ...parts);
}

const percent = (share) => number(100 * share) + "%";

/** One cell for each slot; those in use are lit. */
function slots({ batch }) {
  const text = t("slotsText", batch);
  const count = Math.min(batch.slots, MAX_CELLS);
  const lit = Math.ceil((batch.running / batch.slots) * count);
  const columns = Math.min(count, 16);
  const side = 14;
  const rows = Math.ceil(count / columns);
  const view = `0 0 ${columns * side} ${rows * side}`;
  const drawing = svg("svg", { viewBox: view, class: "cells", role: "img", "aria-label": text });
  for (let cell = 0; cell < count; cell += 1) {
    const place = { x: (cell % columns) * side + 1, y: Math.floor(cell / columns) * side + 1 };
    const size = { width: side - 2, height: side - 2, rx: 3 };
    drawing.append(svg("rect", { ...place, ...size, class: cell < lit ? "lit" : "dark" }));
  }
  return section("slots", text, drawing);
}

/** A dot for each request that waits. */
function queue({ queue: { waiting } }) {
  const text = waiting ? t("queueText", { count: number(waiting) }) : t("queueNone");
  const drawing = svg("svg", { viewBox: "0 0 240 10", class: "dots", role: "img", "aria-label": text });
  for (let place = 0; place < Math.min(waiting, 24); place += 1) {
    drawing.append(svg("circle", { cx: 5 + 10 * place, cy: 5, r: 3.5 }));
  }
  return section("queue", text, waiting ? drawing : null);
}

/** How full each tier of the KV cache is, and what share of the prompts' tokens it gave. */
function tiers({ tiers: held, hit_rates: rates }) {
  if (!rates) return [section("tiers", t("tierOff"), el("p", { class: "small soft" }, t("tiersOff")))];
  const rows = TIERS.map((tier) => {
    const found = held[tier];
    const name = t(`tier_${tier}`);
    const share = found && found.limit_bytes ? Math.min(1, found.used_bytes / found.limit_bytes) : 0;
    const text = found
      ? t("tierText", { used: bytes(found.used_bytes), limit: bytes(found.limit_bytes) })
      : t("tierOff");
    const head = el("div", { class: "tier-head" }, el("span", {}, name), el("span", { class: "soft figure" }, text));
    return el("div", { class: "tier", "data-tier": tier }, head, meter(name, share, text, `fill-${tier}`));
  });
  return [section("tiers", null, ...rows), sources(rates)];
}

function meter(name, share, text, fill) {
  const values = { "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": +(100 * share).toFixed(2) };
  const node = el("div", { class: "meter", role: "meter", "aria-label": name, "aria-valuetext": text, ...values });
  const bar = svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  const width = share > 0 ? Math.max(0.8, 100 * share) : 0;
  bar.append(svg("rect", { class: "track", width: 100, height: 10 }), svg("rect", { class: fill, width, height: 10 }));
  node.append(bar);
  return node;
}

function sources(rates) {
  const parts = [...TIERS.map((tier) => [tier, rates[tier] ?? 0]), ["computed", 1 - rates.total]];
  const bar = svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  let begin = 0;
  for (const [name, share] of parts) {
    bar.append(svg("rect", { class: `fill-${name}`, x: begin, width: 100 * share, height: 10 }));
    begin += 100 * share;
  }
  const legend = parts.map(([name, share]) => {
    const label = t(name === "computed" ? name : `tier_${name}`);
    return el("li", {}, el("span", { class: `key key-${name}` }), label, el("b", { class: "figure" }, percent(share)));
  });
  return section("sources", null, el("div", { class: "meter" }, bar), el("ul", { class: "legend small" }, ...legend));
}

function latency({ latency_ms: found }) {
  const row = (name, values) =>
    el("tr", {}, el("th", { scope: "row" }, t(name)), cell(duration(values.p50)), cell(duration(values.p99)));
  const cell = (text) => el("td", { class: "figure" }, text);
  const heads = [el("td"), el("th", { scope: "col" }, t("median")), el("th", { scope: "col" }, "p99")];
  const rows = [row("latencyFirst", found.time_to_first_token), row("latencyBetween", found.inter_token)];
  const table = el("table", { class: "small" }, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
  return section("latency", null, table);
}

function gpu(stats) {
  const share = stats.gpu_utilization;
  const memory = { used: bytes(stats.gpu_memory_used_bytes), limit: bytes(stats.gpu_memory_total_bytes) };
  const text = t("gpuText", { share: percent(share), ...memory });
  return section("gpu", text, meter(t("gpu"), share, text, "lit"));
}
