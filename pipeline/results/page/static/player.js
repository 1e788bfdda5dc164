// The player: plays a video from a given second, or shows frames if the browser cannot play it; and its details.

import { contentOf, get } from "./api.js";
import { $, clock, el, span, titled } from "./dom.js";
import { thumbnail } from "./thumbnails.js";

const FRAMES = 12;
const SHOWN_FIRST = ["duration_s", "width", "height", "fps", "codec", "n_clips", "n_frames", "truncated", "rotation"];
const HIDDEN = new Set(["path", "reason", "detail", "attempts", "stream_index", "route", "plan_seq", "claimed_frames", "version"]);

let playing = null; // { item, video, second() }
let callbacks = {};

export const setUp = (given) => {
  callbacks = given;
};

export const isOpen = () => playing !== null;

export const current = () => playing;

export function close() {
  if (!playing) return;
  playing.video?.pause();
  playing.video?.removeAttribute("src");
  playing.video?.load();
  if (playing.url) URL.revokeObjectURL(playing.url);
  playing = null;
  $("player").hidden = true;
  $("player").replaceChildren();
  document.body.classList.remove("with-player");
  callbacks.onClose?.();
}

export function pause() {
  const video = playing?.video;
  if (video) video.paused ? video.play().catch(() => {}) : video.pause();
}

/** Play a video of the archive, or a clip of it from its start. */
export async function play(item) {
  if (playing?.item.video_id === item.video_id && playing.video && !playing.video.error) {
    playing.item = item;
    seek(playing.video, item.start_s ?? 0);
    heading(item);
    callbacks.onPlay?.(item);
    return;
  }
  close();
  open(item, item.reason ? null : contentOf(item.video_id));
  const mine = playing;
  try {
    const told = await get("api/video", new URLSearchParams({ id: item.video_id }));
    if (playing !== mine) return;
    if (item.reason) broken(told);
    $("player").append(facts(told.video));
  } catch (error) {
    if (playing === mine) $("player").append(el("p", { className: "note wrong", role: "alert" }, `Its details cannot be shown: ${error.message}`));
  }
}

/** Play a dropped file from the browser's own copy; nothing is sent. */
export function playFile(file) {
  close();
  const url = URL.createObjectURL(file);
  open({ path: file.name, dropped: true }, url);
  playing.url = url;
}

function open(item, src) {
  playing = { item, video: null, second: () => playing?.video?.currentTime ?? item.start_s ?? 0 };
  const stage = el("div", { className: "stage" });
  $("player").replaceChildren(el("div", { className: "bar" }), stage, el("div", { className: "actions" }));
  $("player").hidden = false;
  document.body.classList.add("with-player");
  heading(item);
  if (src) {
    const video = el("video", { controls: true, playsInline: true, preload: "auto", src, "aria-label": `Video ${item.path}` });
    video.muted = true; // browsers do not start a video with sound by themselves
    playing.video = video;
    video.onerror = () => cannotPlay(item);
    video.onloadedmetadata = () => (video.videoWidth ? seek(video, item.start_s ?? 0) : cannotPlay(item));
    stage.append(video);
  }
  if (!item.reason && !item.dropped) {
    $("player").querySelector(".actions").append(
      el("button", { type: "button", onclick: () => callbacks.similar({ video_id: item.video_id }) }, "Similar videos"),
      el("button", { type: "button", id: "like-second", onclick: () => callbacks.similar({ video_id: item.video_id, t: playing.second() }) }, "Clips like this second"),
    );
  }
  callbacks.onPlay?.(item);
}

function seek(video, seconds) {
  video.currentTime = seconds;
  video.play().catch(() => {}); // without a user gesture the browser may refuse to play
}

function heading(item) {
  const times = item.clip_index === undefined || item.clip_index === null ? null : el("span", { className: "times" }, span(item.start_s, item.end_s));
  $("player").querySelector(".bar").replaceChildren(
    el("h2", {}, titled(item.path)),
    times ?? "",
    el("button", { type: "button", className: "close", "aria-label": "Close the player", onclick: close }, "×"),
  );
}

function broken(told) {
  const video = told.video;
  $("player").querySelector(".stage").replaceChildren(
    el("div", { className: "why" }, el("strong", {}, video.reason ?? "not there"), el("p", {}, told.meaning ?? ""), el("p", { className: "detail" }, video.detail ?? ""), told.remedy ? el("p", {}, el("b", {}, "What to do: "), told.remedy) : null),
  );
}

/** Show frames instead: those around the clip, or from the whole video. */
async function cannotPlay(item) {
  const mine = playing;
  if (!mine || mine.item.video_id !== item.video_id || !mine.video) return;
  mine.video = null;
  const stage = $("player").querySelector(".stage");
  stage.replaceChildren(el("p", { className: "why" }, "This browser cannot play it."));
  if (item.dropped) return;
  const isClip = item.clip_index !== undefined && item.clip_index !== null;
  const [from, to] = isClip ? [Math.max(0, item.start_s - 1), item.end_s + 1] : [0, item.duration_s ?? item.end_s];
  const seconds = Array.from({ length: FRAMES }, (_, at) => Number((from + ((at + 0.5) * (to - from)) / FRAMES).toFixed(3)));
  const large = el("div", { className: "large" });
  const strip = el("ul", { className: "strip", "aria-label": "Frames" });
  let at = seconds[0];
  mine.second = () => at;
  const choose = (second) => {
    at = second;
    large.replaceChildren(thumbnail(item.video_id, second), el("span", { className: "time" }, clock(second, true)));
  };
  try {
    const params = new URLSearchParams({ id: item.video_id });
    for (const second of seconds) params.append("t", second);
    const made = await get("api/frames", params); // one decoder makes all of them, before they are requested one by one
    const why = made.failures.find((one) => one);
    if (playing !== mine) return;
    if (why && made.failures.every((one) => one)) return broken({ video: why, meaning: why.meaning, remedy: why.remedy });
  } catch (error) {
    if (playing === mine) broken({ video: { reason: "no frames", detail: error.message } });
    return;
  }
  strip.append(
    ...seconds.map((second) => el("li", {}, el("button", { type: "button", "aria-label": `Frame at ${clock(second, true)}`, onclick: () => choose(second) }, thumbnail(item.video_id, second)))),
  );
  choose(isClip ? seconds[FRAMES >> 1] : seconds[0]);
  stage.replaceChildren(large, strip, el("p", { className: "note" }, "This browser cannot play it; these are frames of it."));
}

function facts(video) {
  const names = Object.keys(video).filter((name) => !HIDDEN.has(name));
  names.sort((a, b) => rank(a) - rank(b));
  const rows = names.flatMap((name) => [el("dt", {}, name), el("dd", {}, el("bdi", {}, said(name, video[name])))]);
  return el("details", { className: "facts" }, el("summary", {}, "Details"), el("dl", {}, ...rows));
}

const rank = (name) => (SHOWN_FIRST.includes(name) ? SHOWN_FIRST.indexOf(name) : ["video_id", "uri"].includes(name) ? 99 : 50);

function said(name, value) {
  if (name === "duration_s") return `${clock(value, true)} (${value.toFixed(3)} s)`;
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toFixed(4)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
