// Helpers that make elements and text. Everything that comes from a dataset becomes text here, never markup.

export const $ = (id) => document.getElementById(id);

/** An element. `props` are its properties, `on…` listeners, `data` and `aria-…` attributes; strings become text. */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "data") Object.assign(made.dataset, value);
    else if (name.startsWith("aria-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Seconds as `0:07` or `1:02:03`; with `tenths` as `1:02:03.4`. */
export function clock(seconds, tenths = false) {
  const unit = tenths ? 10 : 1;
  const total = Math.round(seconds * unit);
  const whole = Math.floor(total / unit);
  const pad = (number) => String(number).padStart(2, "0");
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return (h ? `${h}:${pad(m)}` : `${m}`) + `:${pad(s)}` + (tenths ? `.${total % 10}` : "");
}

export const span = (start, end) => `${clock(start, true)} – ${clock(end, true)}`;

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** The folder and the file name of a path. */
export function parts(path) {
  const at = path.lastIndexOf("/");
  return at < 0 ? ["", path] : [path.slice(0, at), path.slice(at + 1)];
}

/** A path as an element: its name, and its folder in a muted style. */
export function titled(path) {
  const [folder, name] = parts(path);
  return el("span", { className: "path", title: path }, el("bdi", { className: "name" }, name), el("bdi", { className: "folder" }, folder));
}

/** Whether keys pressed in this element are text input. */
export const isTyping = (target) => target.matches?.("input, select, textarea") && target.type !== "checkbox";
