// The list: a card for each video or clip, and the keys that move between them.

import { $, clock, el, span, titled } from "./dom.js";
import { thumbnail } from "./thumbnails.js";

/** Show cards in the list, after the existing ones (`append`) or instead of them. */
export function show(items, { append = false, play, similar, clusterOf }) {
  const cards = items.map((item) => card(item, { play, similar, cluster: clusterOf(item.video_id) }));
  if (append) $("list").append(...cards);
  else $("list").replaceChildren(...cards);
  const all = buttons();
  if (all.length && !all.some((one) => one.tabIndex === 0)) all[0].tabIndex = 0;
}

/** Mark the cards of the video that is playing. */
export function mark(id, start) {
  for (const one of buttons()) {
    const same = one.item.video_id === id && (one.item.start_s ?? 0) === (start ?? 0);
    one.closest("li").classList.toggle("playing", same);
  }
}

export const focused = () => document.activeElement?.item ?? null;

export function focusFirst() {
  buttons()[0]?.focus();
}

/** Move the focus to the card that a key leads to. True if the key is handled here. */
export function move(key) {
  const all = buttons();
  const at = all.indexOf(document.activeElement);
  if (at < 0) {
    if (key !== "ArrowDown" || !all.length) return false;
    all.find((one) => one.tabIndex === 0).focus();
    return true;
  }
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - columns(all), ArrowDown: at + columns(all), Home: 0, End: all.length - 1 }[key];
  if (to === undefined) return false;
  if (to < 0 && key === "ArrowUp") $("text").focus();
  else all[Math.max(0, Math.min(to, all.length - 1))].focus();
  return true;
}

const buttons = () => [...$("list").querySelectorAll("button.card")];

function columns(all) {
  const top = all[0].getBoundingClientRect().top;
  const second = all.findIndex((one) => one.getBoundingClientRect().top > top + 4);
  return second < 0 ? all.length : second;
}

function card(item, { play, similar, cluster }) {
  const isClip = item.clip_index !== undefined && item.clip_index !== null;
  const about = item.cosine === undefined ? `${clock(item.duration_s ?? 0)}` : isClip ? span(item.start_s, item.end_s) : clock(item.end_s);
  const middle = isClip ? (item.start_s + item.end_s) / 2 : (item.duration_s ?? item.end_s) / 2;
  const main = el("button", { className: "card", type: "button", tabIndex: -1, item, onclick: () => play(item) });
  const picture = el("span", { className: "picture" });
  main.append(picture, el("span", { className: "label" }, dot(cluster), titled(item.path)));
  main.addEventListener("focus", () => {
    for (const other of buttons()) other.tabIndex = other === main ? 0 : -1;
  });
  if (item.reason) {
    picture.classList.add("failed");
    picture.append(el("strong", {}, item.reason), el("span", {}, "not embedded"));
    return el("li", {}, main);
  }
  picture.append(thumbnail(item.video_id, middle), el("span", { className: "time" }, about));
  if (item.cosine !== undefined) picture.append(el("span", { className: "cosine", title: "cosine" }, item.cosine.toFixed(3)));
  if (item.note) main.append(el("span", { className: "like" }, item.note));
  const more = el("button", { className: "more-like", type: "button", tabIndex: -1, onclick: () => similar(item), "aria-label": `Similar to ${item.path}` }, "Similar");
  return el("li", {}, main, more);
}

/** A dot in the cluster's colour; page.css has the eight colours. */
export const dot = (cluster) => (cluster === undefined || cluster === null ? null : el("span", { className: `dot c${cluster}`, "aria-hidden": "true" }));
