// Thumbnails of videos, loaded when they come into view. A browser opens six connections to a server, and each picture
// occupies one while it is decoded. At most MOST are requested at a time, so that other requests never wait.

import { get, pictureOf } from "./api.js";
import { el } from "./dom.js";

const MOST = 3;
const TOGETHER = 12; // pictures of one video made by one decoder
const NEAR = "200px";

const waiting = [];
let loading = 0;

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    waiting.push(target);
  }
  next();
}, { rootMargin: NEAR });

/** A picture of one second of a video; if it cannot be made, the reason. */
export function thumbnail(id, seconds) {
  const picture = el("img", { alt: "", decoding: "async", data: { id, seconds: seconds.toFixed(3) } });
  watcher.observe(picture);
  return picture;
}

function next() {
  while (loading < MOST && waiting.length) {
    const first = waiting.shift();
    if (!first.isConnected) continue; // the list has changed since
    const same = waiting.filter((one) => one.dataset.id === first.dataset.id && one.isConnected).slice(0, TOGETHER - 1);
    for (const one of same) waiting.splice(waiting.indexOf(one), 1);
    loading += 1;
    load([first, ...same]).finally(() => {
      loading -= 1;
      next();
    });
  }
}

async function load(pictures) {
  const { id } = pictures[0].dataset;
  if (pictures.length > 1) {
    await get("api/frames", new URLSearchParams([["id", id], ...pictures.map((one) => ["t", one.dataset.seconds])])).catch(() => {});
  }
  for (const picture of pictures) await shown(picture);
}

function shown(picture) {
  const { id, seconds } = picture.dataset;
  return new Promise((done) => {
    picture.onload = () => done(picture.classList.add("there"));
    picture.onerror = () => done(refused(picture, id, seconds));
    picture.src = pictureOf(id, Number(seconds));
  });
}

async function refused(picture, id, seconds) {
  try {
    await get("picture", new URLSearchParams({ id, t: seconds }));
  } catch (error) {
    picture.replaceWith(el("span", { className: "no-picture", title: error.message }, error.record?.reason ?? "no picture"));
  }
}
