// The page. Its state is in the URL's fragment, so that back, forward and reload work:
//   #text=…&where=…&cluster=2&failed=yes      the list
//   #like=ID&t=12.5&level=clip&where=…        what is similar to a video, or to one second of it; every=yes: all clips
//   #dropped=KEY&name=…                       what is similar to a dropped file

import { drop, get, getWhenRead, pictureOf } from "./api.js";
import * as cards from "./cards.js";
import { $, clock, count, el, isTyping, titled } from "./dom.js";
import * as filters from "./filters.js";
import * as map from "./map.js";
import * as player from "./player.js";

const TYPING_MS = 150;
const PAGE = 60;
let about = null; // the server's description of the dataset
let asking = new AbortController(); // of the list's current request
let sending = null; // AbortController of the file that is being sent
const files = new Map(); // key of a dropped file -> the File, until the page is closed
let listed = []; // ids of the list, in order
let shown = null; // what the list shows, without how it is compared
const left = new Map(); // such a view -> where it was scrolled to when it was left
const HOW = ["level", "distinct", "own", "every"]; // of a query: how it is compared

const state = () => new URLSearchParams(location.hash.slice(1));

/** Go to another view; `replace` adds no history entry, as while the user is typing. */
function go(params, replace = false) {
  const url = `#${params}`;
  if (url === (location.hash || "#")) return;
  if (replace) {
    history.replaceState(null, "", url);
    render();
  } else location.hash = url;
}

function changed(change, replace = false) {
  const params = state();
  change(params);
  go(params, replace);
}

const isQuery = (params) => params.has("like") || params.has("dropped");

function similar(item) {
  const params = new URLSearchParams({ like: item.video_id });
  if (item.t !== undefined) {
    params.set("t", item.t.toFixed(2));
    params.set("level", "clip");
  } else if (item.clip_index !== undefined && item.clip_index !== null) {
    params.set("t", ((item.start_s + item.end_s) / 2).toFixed(3));
    params.set("level", "clip");
  }
  for (const where of state().getAll("where")) params.append("where", where);
  go(params);
}

function play(item) {
  player.play(item);
}

const ways = { play, similar, clusterOf: map.clusterOf };

async function render() {
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  left.set(shown, scrollY);
  const params = state();
  const wait = setTimeout(() => say("Searching …"), 250);
  showEscape();
  showChips(params);
  showQuery(params);
  if (document.activeElement !== $("text")) $("text").value = params.get("text") ?? "";
  try {
    if (isQuery(params)) await showSimilar(params, signal);
    else await showVideos(params, signal, false);
    toFirst(params);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("list").replaceChildren();
    $("more").hidden = true;
    say(error.message, true);
  } finally {
    clearTimeout(wait);
  }
}

/** Scroll to the first card, which is the best hit, if the list shows something else than before; a list of videos that
 *  was left comes back as it was. */
function toFirst(params) {
  const what = new URLSearchParams(params);
  for (const name of HOW) what.delete(name);
  if (shown === String(what)) return;
  shown = String(what);
  const place = isQuery(params) ? 0 : (left.get(shown) ?? 0);
  scrollTo(0, place);
  if (!place) $("list").firstElementChild?.scrollIntoView({ block: "nearest" }); // a phone has the player above the list
}

async function showVideos(params, signal, more) {
  const asked = new URLSearchParams(params);
  asked.set("offset", more ? listed.length : 0);
  asked.set("limit", PAGE);
  const found = await get("api/videos", asked, signal);
  cards.show(found.videos, { ...ways, append: more });
  listed = [...(more ? listed : []), ...found.videos.map((one) => one.video_id)];
  $("more").hidden = listed.length >= found.total;
  map.light(params.has("text") || params.has("where") || params.has("cluster") ? listed : [], null);
  markPlaying();
  const narrowed = ["text", "where", "cluster", "failed"].some((name) => params.has(name));
  if (!found.total) say(narrowed ? "No video matches." : "No videos yet.");
  else say(`${count(found.total, "video")}${narrowed ? " found" : ""}`);
  if (!narrowed && about.failed) $("status").append(", ", el("a", { href: "#failed=yes" }, `${about.failed.toLocaleString("en")} of them failed`));
  if (!narrowed && about.pending) $("status").append(`; ${about.pending.toLocaleString("en")} more still to be done`);
}

async function showSimilar(params, signal) {
  const asked = new URLSearchParams({ level: level(params) });
  if (params.has("like")) asked.set("id", params.get("like"));
  for (const name of ["t", "dropped", "distinct", "own", "every"]) if (params.has(name)) asked.set(name, params.get(name));
  for (const where of params.getAll("where")) asked.append("where", where);
  const found = await get("api/similar", asked, signal);
  const many = found.query_vectors > 1;
  if (found.warning) $("query").append(el("p", { className: "note", role: "status" }, found.warning));
  for (const hit of found.hits) if (many) hit.note = `like ${clock(hit.query_start_s, true)} of the query`;
  cards.show(found.hits, ways);
  $("more").hidden = true;
  map.light(found.hits.map((one) => one.video_id), params.get("like"));
  markPlaying();
  const noun = found.level === "clip" ? "clip" : "video";
  const how = found.indexed ? `by the index of ${found.indexed.toLocaleString("en")}` : `among ${count(found.rows, noun)}`;
  const each = noun === "clip" && !params.has("every") ? ", one per video" : "";
  say(found.hits.length ? `The ${count(found.hits.length, noun)} most similar to it${each}, ${how}, in ${found.seconds.toFixed(2)} s` : "No hits are left. Relax the filters, or show near-copies.");
  if (found.hits.length && found.cut_short) $("status").append("; many near-copies were left out, so there may be more hits than these");
  if (!found.indexed && found.seconds > 3) $("status").append(el("span", {}, `; p3d results index OUT --level ${noun} makes this faster`));
}

const level = (params) => params.get("level") ?? "video";

function showChips(params) {
  const chips = params.getAll("where").map((where) => [where, () => changed((all) => all.delete("where", where))]);
  if (params.has("cluster")) chips.push([`cluster ${Number(params.get("cluster")) + 1}`, () => changed((all) => all.delete("cluster"))]);
  if (params.has("failed")) chips.push([params.get("failed") === "yes" ? "failed" : "not failed", () => changed((all) => all.delete("failed"))]);
  filters.show(chips);
}

/** Show the query, and how it is compared. */
function showQuery(params) {
  const box = $("query");
  box.hidden = !isQuery(params);
  if (box.hidden) return box.replaceChildren();
  const second = params.has("t") ? Number(params.get("t")) : null;
  const id = params.get("like");
  const what = el("div", { className: "what" });
  if (id !== null) {
    const picture = el("img", { alt: "", src: pictureOf(id, second ?? 0) });
    const name = el("span", { className: "path" }, id);
    what.append(picture, name);
    get("api/video", new URLSearchParams({ id })).then(
      ({ video }) => {
        name.replaceWith(titled(video.path));
        if (second === null) picture.src = pictureOf(id, (video.duration_s ?? 0) / 2);
      },
      (error) => what.isConnected && box.append(el("p", { className: "note wrong", role: "alert" }, `Its name cannot be shown: ${error.message}`)),
    );
  } else {
    const file = files.get(params.get("dropped"));
    what.append(titled(params.get("name") ?? "the dropped file"));
    if (file) what.append(el("button", { type: "button", onclick: () => player.playFile(file) }, "Play"));
  }
  const title = second === null ? "Similar to" : `Like second ${clock(second, true)} of`;
  const choice = (value, text) =>
    el("button", { type: "button", "aria-pressed": String(level(params) === value), onclick: () => changed((all) => all.set("level", value)) }, text);
  const distinct = el("select", { "aria-label": "Near-copies", onchange: (event) => changed((all) => (event.target.value ? all.set("distinct", event.target.value) : all.delete("distinct"))) });
  for (const [value, text] of [["", "Near-copies shown"], ["0.9999", "Without cosine ≥ 0.9999"], ["0.999", "Without cosine ≥ 0.999"], ["0.99", "Without cosine ≥ 0.99"], ["0.95", "Without cosine ≥ 0.95"]]) {
    distinct.append(el("option", { value, selected: value === (params.get("distinct") ?? "") }, text));
  }
  const every = el("input", { type: "checkbox", checked: params.get("every") === "yes", onchange: (event) => changed((all) => (event.target.checked ? all.set("every", "yes") : all.delete("every"))) });
  const own = el("input", { type: "checkbox", checked: params.get("own") === "yes", onchange: (event) => changed((all) => (event.target.checked ? all.set("own", "yes") : all.delete("own"))) });
  box.replaceChildren(
    el("h2", {}, title),
    what,
    el("button", { type: "button", className: "close", "aria-label": "Back to all videos", onclick: () => go(new URLSearchParams()) }, "×"),
    el("div", { className: "how" },
      about.levels.length > 1 ? el("span", { className: "choice", role: "group", "aria-label": "What is compared" }, choice("video", "Videos"), choice("clip", "Clips")) : null,
      distinct,
      level(params) === "clip" ? el("label", {}, every, "every clip") : null,
      id !== null ? el("label", {}, own, level(params) === "clip" ? "its own clips too" : "itself too") : null),
  );
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function markPlaying() {
  showEscape();
  const now = player.current()?.item;
  cards.mark(now?.video_id, now?.start_s);
  map.select(now?.video_id);
}

async function take(file) {
  if (!file) return;
  if (!about.drop_bytes) return say("There are no weights in this output, so a file cannot be embedded.", true);
  if (file.size > about.drop_bytes) return say(`${file.name} has ${(file.size / 1e6).toFixed(0)} MB; at most ${(about.drop_bytes / 1e6).toFixed(0)} MB may be dropped (--drop-limit).`, true);
  sending?.abort();
  sending = new AbortController();
  const box = $("drop");
  let share = 0;
  let sent = null; // when all of it was sent
  const tell = () => {
    if (share >= 1) sent ??= performance.now();
    const mb = (bytes) => (bytes / 1e6).toFixed(1);
    const text = sent === null ? `Sending ${file.name}: ${mb(share * file.size)} of ${mb(file.size)} MB, ${Math.floor(100 * share)}%` : `Embedding ${file.name} … ${Math.round((performance.now() - sent) / 1000)} s`;
    box.querySelector("p").textContent = text;
    if (sent === null) $("sent").value = share;
    else $("sent").removeAttribute("value"); // how much is embedded is not known
  };
  const clockwork = setInterval(tell, 500);
  box.hidden = $("sent").hidden = $("cancel").hidden = false;
  box.classList.add("busy");
  tell();
  try {
    const made = await drop(file, (now) => ((share = now), tell()), sending.signal);
    files.set(made.dropped, file);
    player.playFile(file);
    const params = new URLSearchParams({ dropped: made.dropped, name: file.name });
    for (const where of state().getAll("where")) params.append("where", where);
    go(params);
  } catch (error) {
    if (error.name !== "AbortError") say(`${file.name}: ${error.message}`, true);
  } finally {
    clearInterval(clockwork);
    box.hidden = $("sent").hidden = $("cancel").hidden = true;
    box.classList.remove("busy");
    sending = null;
  }
}

/** What Esc does now: [words for the button, function]; null if it only leaves a field. */
function step() {
  const params = state();
  if (sending) return ["Cancel", () => sending.abort()];
  if (filters.isOpen()) return ["Close filters", filters.toggle];
  if (player.isOpen()) return ["Close player", player.close];
  if (params.has("text") || $("text").value) return ["Clear search", () => (($("text").value = ""), changed((all) => all.delete("text")), showEscape())];
  if ([...params].length) return ["All videos", () => go(new URLSearchParams())];
  return null;
}

function escape() {
  const now = step();
  if (now) now[1]();
  else document.activeElement?.blur();
}

function showEscape() {
  const now = step();
  $("escape").hidden = !now;
  if (now) $("escape").firstElementChild.textContent = now[0];
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.key === "Escape") {
    event.preventDefault();
    return escape();
  }
  if (event.target === $("text") && event.key === "ArrowDown") {
    event.preventDefault();
    return cards.focusFirst();
  }
  if (isTyping(event.target) || event.target.matches?.("video")) return;
  const focused = cards.focused();
  const act = {
    "/": () => $("text").select(),
    s: () => (focused && !focused.reason ? similar(focused) : player.current()?.item.video_id && similar({ video_id: player.current().item.video_id })),
    c: () => player.current()?.item.video_id && similar({ video_id: player.current().item.video_id, t: player.current().second() }),
    p: player.pause,
    f: filters.toggle,
    "?": () => $("keys").showModal(),
  }[event.key];
  if (act) act();
  else if (!cards.move(event.key)) return;
  event.preventDefault();
}

function listen() {
  let typing;
  $("text").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      const text = $("text").value;
      const params = isQuery(state()) ? new URLSearchParams() : state();
      text ? params.set("text", text) : params.delete("text");
      go(params, !isQuery(state()));
    }, TYPING_MS);
  });
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    cards.focusFirst();
  });
  $("more").addEventListener("click", () => showVideos(state(), asking.signal, true).catch((error) => error.name === "AbortError" || say(error.message, true)));
  $("escape").addEventListener("click", escape);
  $("cancel").addEventListener("click", escape);
  $("keys-button").addEventListener("click", () => $("keys").showModal());
  $("file-button").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    take($("file").files[0]);
    $("file").value = "";
  });
  history.scrollRestoration = "manual"; // the browser would scroll before the list is there
  addEventListener("hashchange", render);
  addEventListener("keydown", keys);
  let inside = 0;
  const overlay = (on) => {
    if (sending) return;
    $("drop").hidden = !on;
    $("drop").querySelector("p").textContent = about?.drop_bytes ? "Drop a video to search by it" : "This output has no weights to embed a file with";
  };
  addEventListener("dragenter", (event) => event.dataTransfer?.types.includes("Files") && overlay(++inside > 0));
  addEventListener("dragleave", (event) => event.dataTransfer?.types.includes("Files") && overlay(--inside > 0));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    overlay(false);
    take(event.dataTransfer?.files[0]);
  });
}

async function start() {
  about = await getWhenRead("api/about", "", ({ done, of }) => say(of ? `Reading the videos: ${Math.floor((100 * done) / of)}%` : "Reading the videos ..."));
  document.title = `${about.out.split("/").pop()} · p3d`;
  $("source").textContent = `${about.out} · ${about.model}, weights ${about.weights}, clips ${about.clips}`;
  $("file-button").hidden = !about.drop_bytes;
  player.setUp({ similar, onPlay: markPlaying, onClose: markPlaying });
  filters.setUp(about.columns, showEscape, (condition) => changed((all) => all.append("where", condition)));
  listen();
  const drawn = map.load({ play, similar, cluster: (number) => go(new URLSearchParams({ cluster: number })) }).catch(map.fail);
  await render();
  await drawn;
  document.body.classList.add("ready");
}

start().catch((error) => say(`The page cannot be loaded: ${error.message}`, true));
