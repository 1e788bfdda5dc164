// Conditions on columns, and other filters of the list, shown as removable chips.

import { $, el } from "./dom.js";

const PREFERRED = ["duration_s", "codec", "n_clips", "width", "height", "fps"];

let toggled = () => {};

/** Fill the form with the columns. `add` gets a condition such as `codec=h264`; `onToggle` is called after `toggle`. */
export function setUp(columns, onToggle, add) {
  toggled = onToggle;
  const own = columns.filter((one) => !["video_id", "path", "uri", "version"].includes(one.name));
  own.sort((a, b) => rank(a.name) - rank(b.name));
  $("column").append(...own.map((one) => el("option", { value: one.name }, `${one.name} · ${kindOf(one.kind)}`)));
  const byName = new Map(columns.map((one) => [one.name, one]));
  const suggest = () => {
    const column = byName.get($("column").value);
    $("values").replaceChildren(...(column?.values ?? []).map((value) => el("option", { value })));
    const ordered = isOrdered(column?.kind ?? "");
    if (ordered && $("operator").value === "=") $("operator").value = ">=";
    if (!ordered) $("operator").value = "=";
  };
  $("column").addEventListener("change", suggest);
  suggest();
  $("condition").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!$("column").value || $("value").value === "") return $("value").focus();
    add(`${$("column").value}${$("operator").value}${$("value").value}`);
    $("value").value = "";
  });
  $("filters-button").addEventListener("click", toggle);
}

const isOrdered = (kind) => /int|float|double|decimal|date|timestamp/.test(kind);
const kindOf = (kind) => (/int|float|double|decimal/.test(kind) ? "number" : kind === "string" ? "text" : kind);

const rank = (name) => (PREFERRED.includes(name) ? PREFERRED.indexOf(name) : 50);

export function toggle() {
  const open = $("filters").hidden;
  $("filters").hidden = !open;
  $("filters-button").setAttribute("aria-expanded", String(open));
  if (open) $("column").focus();
  toggled();
}

export const isOpen = () => !$("filters").hidden;

/** `chips` are [text, function that removes it]. */
export function show(chips) {
  $("chips").hidden = !chips.length;
  $("chips").replaceChildren(
    ...chips.map(([text, remove]) =>
      el("li", {}, el("bdi", {}, text), el("button", { type: "button", "aria-label": `Remove ${text}`, onclick: remove }, "×"))),
  );
}
