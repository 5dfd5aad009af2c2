// Where a message is written: text that grows, pictures by button, drop or paste, Enter and Escape.

import { $, el, icon } from "./dom.js";
import { inLanguage, t } from "./i18n.js";
import { readPicture } from "./pictures.js";

/** A touch keyboard covers half the page, so it comes only when it is asked for, and its Enter starts a line. */
const touch = matchMedia("(pointer: coarse)");

/** Calls `onSend(text, pictures)`, `onStop()` and, for a file that is no picture, `onBad(name)`. */
export class Composer {
  constructor({ onSend, onStop, onBad }) {
    this._onSend = onSend;
    this._onStop = onStop;
    this._onBad = onBad;
    this._pictures = [];
    this._busy = false;
    this._text = $("message");
    this._text.addEventListener("input", () => this._fit());
    this._text.addEventListener("keydown", (event) => this._onKey(event));
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this._send();
    });
    $("stop").addEventListener("click", () => onStop());
    $("add-picture").addEventListener("click", () => $("files").click());
    $("files").addEventListener("change", (event) => {
      void this.add([...event.target.files]);
      event.target.value = "";
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this._busy && !document.querySelector("dialog[open]")) onStop();
    });
    document.addEventListener("paste", (event) => this._onPaste(event));
    this._watchDrops();
    inLanguage(() => this._show());
  }

  /** While an answer grows there is a stop button, and what is written waits. */
  setBusy(busy) {
    const stopped = document.activeElement === $("stop");
    this._busy = busy;
    $("stop").hidden = !busy;
    $("send").hidden = busy;
    if (stopped) this.focus();
  }

  /** Put a message there, to be changed and sent again. */
  set(text, pictures) {
    this._text.value = text;
    this._pictures = [...pictures];
    this._show();
    this._text.focus();
  }

  focus() {
    if (!touch.matches) this._text.focus({ preventScroll: true });
  }

  /** Take what of the files are pictures. */
  async add(files) {
    for (const file of files) {
      const picture = await readPicture(file);
      if (picture) this._pictures.push(picture);
      else this._onBad(file.name);
    }
    this._show();
    this.focus();
  }

  _onKey(event) {
    if (event.key !== "Enter" || event.shiftKey || touch.matches) return;
    if (event.isComposing) return; // an input method takes Enter for itself
    event.preventDefault();
    this._send();
  }

  _send() {
    const text = this._text.value.trim();
    if (this._busy || (!text && !this._pictures.length)) return;
    const pictures = this._pictures;
    this._text.value = "";
    this._pictures = [];
    this._show();
    this._onSend(text, pictures);
  }

  _onPaste(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    void this.add(files);
  }

  _watchDrops() {
    let inside = 0; // dragenter and dragleave come for every element that is crossed
    const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    const show = (change) => (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      inside = Math.max(0, inside + change);
      $("drop").hidden = !inside;
    };
    window.addEventListener("dragenter", show(1));
    window.addEventListener("dragleave", show(-1));
    window.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
    window.addEventListener("drop", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      inside = 0;
      $("drop").hidden = true;
      void this.add([...event.dataTransfer.files]);
    });
  }

  _show() {
    const shown = this._pictures.map((picture) => {
      const image = el("img", { src: URL.createObjectURL(picture.blob), alt: t("pictureOf", picture) });
      image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
      const label = t("removePicture", picture);
      const remove = el("button", { type: "button", "aria-label": label, title: label }, icon("close"));
      remove.addEventListener("click", () => {
        this._pictures = this._pictures.filter((each) => each !== picture);
        this._show();
        this.focus();
      });
      return el("div", { class: "waiting-picture" }, image, remove);
    });
    $("pictures").replaceChildren(...shown);
    this._fit();
  }

  _fit() {
    this._text.style.height = "auto";
    this._text.style.height = `${Math.min(this._text.scrollHeight, 0.4 * window.innerHeight)}px`;
  }
}
