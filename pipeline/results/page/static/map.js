// The map: a point for each video, drawn on a canvas. Wheel, + and - zoom, dragging pans, arrow keys select a point.

import { getWhenRead } from "./api.js";
import { $, clock, count, el, titled } from "./dom.js";
import { thumbnail } from "./thumbnails.js";

const EDGE = 14; // pixels around the points
const REACH = 14; // pixels within which the pointer selects a point
const MOST_ZOOM = 60;

let points = null; // { ids, paths, durations, x, y, cluster, ... }, x and y in [0, 1]
let at = new Map(); // id -> number
let view = { zoom: 1, x: 0.5, y: 0.5 }; // the middle of what is shown
let selected = -1;
let lit = new Set(); // numbers that are hits
let query = -1;
let callbacks = {};
let asked = [[], null]; // of the last call of `light`
let size = { width: 0, height: 0 };

export async function load(given) {
  callbacks = given;
  points = await getWhenRead("api/map", "", () => {});
  if (points.ids.length < 3) return;
  for (const axis of ["x", "y"]) {
    const [low, high] = points[axis].reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
    points[axis] = points[axis].map((value) => (high > low ? (value - low) / (high - low) : 0.5));
  }
  at = new Map(points.ids.map((id, number) => [id, number]));
  $("map").hidden = false;
  const how = points.layout === "umap" ? "by UMAP" : `by PCA: both axes show ${Math.round(100 * (points.share ?? 0))}% of the variance`;
  $("map-note").textContent = `${count(points.ids.length, "video")}${points.ids.length < points.of ? ` of ${points.of.toLocaleString("en")}, drawn at random` : ""}, ${how}.`;
  light(...asked); // the hits may have come before the map
  legend();
  listen();
  new ResizeObserver(resize).observe($("plane"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

/** Show an error in place of the map. */
export function fail(error) {
  [points, at] = [null, new Map()];
  $("map").hidden = false;
  $("plane").hidden = true;
  $("map-note").classList.add("wrong");
  $("map-note").textContent = `There is no map: ${error.message}`;
}

export const clusterOf = (id) => (at.has(id) ? points.cluster[at.get(id)] : null);

/** Highlight the videos that are hits, and the query video. */
export function light(ids, queryId) {
  asked = [ids, queryId];
  lit = new Set(ids.map((id) => at.get(id)).filter((number) => number !== undefined));
  query = at.get(queryId) ?? -1;
  if (points) draw();
}

export function select(id) {
  selected = at.get(id) ?? -1;
  if (points) draw();
}

function legend() {
  const sizes = points.cluster.reduce((all, one) => all.set(one, (all.get(one) ?? 0) + 1), new Map());
  if (points.middles.length < 2) return;
  $("legend").replaceChildren(
    ...points.middles.map((id, cluster) => {
      const number = at.get(id);
      const label = `Cluster ${cluster + 1}: ${count(sizes.get(cluster) ?? 0, "video")}, such as ${points.paths[number]}`;
      const chip = el("button", { type: "button", className: `chip c${cluster}`, title: label, "aria-label": label, onclick: () => callbacks.cluster(cluster) });
      chip.append(thumbnail(id, points.durations[number] / 2), el("span", {}, (sizes.get(cluster) ?? 0).toLocaleString("en")));
      return el("li", {}, chip);
    }),
  );
}

function resize() {
  const box = $("plane").getBoundingClientRect();
  const canvas = $("canvas");
  size = { width: box.width, height: box.height };
  canvas.width = Math.round(box.width * devicePixelRatio);
  canvas.height = Math.round(box.height * devicePixelRatio);
  draw();
}

const screenX = (number) => size.width / 2 + (points.x[number] - view.x) * view.zoom * (size.width - 2 * EDGE);
const screenY = (number) => size.height / 2 - (points.y[number] - view.y) * view.zoom * (size.height - 2 * EDGE);

function draw() {
  const canvas = $("canvas");
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const colours = Array.from({ length: 8 }, (_, cluster) => style.getPropertyValue(`--c${cluster}`));
  pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  pen.clearRect(0, 0, size.width, size.height);
  const radius = points.ids.length > 3000 ? 2 : points.ids.length > 300 ? 3 : 5;
  const dim = lit.size > 0;
  for (let pass = 0; pass < 2; pass++) {
    for (let number = 0; number < points.ids.length; number++) {
      const isLit = lit.has(number);
      if (isLit !== (pass === 1)) continue;
      pen.globalAlpha = dim && !isLit ? 0.25 : 0.9;
      pen.fillStyle = colours[points.cluster[number]];
      pen.beginPath();
      pen.arc(screenX(number), screenY(number), isLit ? radius + 1 : radius, 0, 7);
      pen.fill();
    }
  }
  pen.globalAlpha = 1;
  const ink = style.getPropertyValue("--ink");
  if (query >= 0) ring(pen, query, radius + 4, ink, 2.5);
  if (selected >= 0) ring(pen, selected, radius + 3, ink, 1.5);
}

function ring(pen, number, radius, colour, width) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.beginPath();
  pen.arc(screenX(number), screenY(number), radius, 0, 7);
  pen.stroke();
}

function nearest(x, y) {
  let best = -1;
  let least = REACH * REACH;
  for (let number = 0; number < points.ids.length; number++) {
    const far = (screenX(number) - x) ** 2 + (screenY(number) - y) ** 2;
    if (far < least) [best, least] = [number, far];
  }
  return best;
}

/** The nearest point within 45 degrees of a direction, seen from the selected point. */
function towards(dx, dy) {
  let best = -1;
  let least = Infinity;
  for (let number = 0; number < points.ids.length; number++) {
    const x = screenX(number) - screenX(selected);
    const y = screenY(number) - screenY(selected);
    const along = x * dx + y * dy;
    const aside = Math.abs(x * dy) + Math.abs(y * dx);
    if (number === selected || along <= 0 || aside > along) continue;
    if (along + 2 * aside < least) [best, least] = [number, along + 2 * aside];
  }
  return best;
}

function item(number) {
  return { video_id: points.ids[number], path: points.paths[number], duration_s: points.durations[number] };
}

function choose(number) {
  if (number < 0) return;
  selected = number;
  tip(number);
  draw();
}

function tip(number) {
  const box = $("tip");
  if (number < 0) {
    box.hidden = true;
    return;
  }
  if (box.number !== number || box.hidden) {
    box.number = number;
    box.replaceChildren(thumbnail(points.ids[number], points.durations[number] / 2), titled(points.paths[number]), el("span", { className: "time" }, clock(points.durations[number])));
    box.hidden = false;
  }
  const x = Math.max(4, Math.min(screenX(number) - 80, size.width - 164));
  const above = screenY(number) > size.height / 2;
  box.style.left = `${x}px`;
  box.style.top = above ? "" : `${screenY(number) + 12}px`;
  box.style.bottom = above ? `${size.height - screenY(number) + 12}px` : "";
}

function zoom(factor, x = size.width / 2, y = size.height / 2) {
  const before = { x: (x - size.width / 2) / view.zoom / (size.width - 2 * EDGE), y: (y - size.height / 2) / view.zoom / (size.height - 2 * EDGE) };
  const wanted = Math.max(1, Math.min(MOST_ZOOM, view.zoom * factor));
  const share = 1 - view.zoom / wanted;
  view = { zoom: wanted, x: view.x + before.x * share, y: view.y - before.y * share };
  if (wanted === 1) view = { zoom: 1, x: 0.5, y: 0.5 };
  tip(-1);
  draw();
}

function listen() {
  const canvas = $("canvas");
  let held = null;
  canvas.addEventListener("pointermove", (event) => {
    if (held) {
      const [dx, dy] = [event.clientX - held.x, event.clientY - held.y];
      held.moved ||= Math.hypot(dx, dy) > 4;
      if (held.moved) {
        view.x = held.view.x - dx / view.zoom / (size.width - 2 * EDGE);
        view.y = held.view.y + dy / view.zoom / (size.height - 2 * EDGE);
        tip(-1);
        draw();
      }
      return;
    }
    const number = nearest(event.offsetX, event.offsetY);
    canvas.classList.toggle("over", number >= 0);
    tip(number);
  });
  canvas.addEventListener("pointerdown", (event) => {
    held = { x: event.clientX, y: event.clientY, view: { ...view }, moved: false };
    if (event.pointerType === "mouse") canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", (event) => {
    const moved = held?.moved;
    held = null;
    if (moved) return;
    const number = nearest(event.offsetX, event.offsetY);
    if (number < 0) return;
    choose(number);
    callbacks.play(item(number));
  });
  canvas.addEventListener("pointercancel", () => (held = null));
  canvas.addEventListener("pointerleave", () => held ?? tip(-1));
  canvas.addEventListener("blur", () => tip(-1));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (way) choose(selected < 0 ? 0 : towards(...way));
    else if (event.key === "Enter" && selected >= 0) callbacks.play(item(selected));
    else if (event.key === "s" && selected >= 0) callbacks.similar(item(selected));
    else if (event.key === "+" || event.key === "=") zoom(1.5);
    else if (event.key === "-") zoom(1 / 1.5);
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (way && selected >= 0) $("canvas").setAttribute("aria-description", points.paths[selected]);
  });
}
