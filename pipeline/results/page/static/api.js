// Requests to the server, all relative to the page, whose URL contains the token.

/** As `get`, but waits until the server has read what is asked for; `onLoading` gets how far it is. */
export async function getWhenRead(name, params, onLoading) {
  for (;;) {
    try {
      return await get(name, params);
    } catch (error) {
      if (!error.record?.loading) throw error;
      onLoading(error.record.loading);
      await new Promise((done) => setTimeout(done, 500));
    }
  }
}

/** The JSON of a response. Throws an Error with the server's message, and its whole JSON as `record`. */
export async function get(name, params, signal) {
  const reply = await fetch(`${name}?${params}`, { signal });
  return answered(reply.status, await reply.text());
}

function answered(status, text) {
  let record;
  try {
    record = JSON.parse(text);
  } catch {
    record = { error: text.trim() || `the server answered ${status}` };
  }
  if (status < 400) return record;
  const error = new Error(record.error ?? `${record.meaning}: it ${record.detail}`);
  throw Object.assign(error, { record });
}

export const pictureOf = (id, seconds) => `picture?${new URLSearchParams({ id, t: seconds.toFixed(3) })}`;
export const contentOf = (id) => `content?${new URLSearchParams({ id })}`;

/** Send a file to search by; `onProgress` is called with the share that is sent, in [0, 1]. */
export function drop(file, onProgress, signal) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("POST", `api/drop?${new URLSearchParams({ name: file.name })}`);
    request.upload.onprogress = (event) => onProgress(event.loaded / Math.max(1, event.total));
    request.upload.onload = () => onProgress(1);
    request.onload = () => {
      try {
        done(answered(request.status, request.responseText));
      } catch (error) {
        failed(error);
      }
    };
    request.onerror = () => failed(new Error("the server does not answer; is `p3d results serve` still running?"));
    request.onabort = () => failed(new DOMException("", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}
