// The server's API as the page uses it: plain fetch, server-sent events, and one kind of error.

/** `code` is the server's (python_backends/errors.py), or `unreachable` and `connection_lost` of the page's own. */
export class ApiError extends Error {
  constructor(code, message = "", retryAfterS = 0) {
    super(message);
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("unreachable", error.message);
  }
  if (response.ok) return response;
  const retryAfterS = Number(response.headers.get("Retry-After")) || 0;
  const body = await response.json().catch(() => ({}));
  const found = body.error ?? {};
  throw new ApiError(found.code ?? `http_${response.status}`, found.message ?? response.statusText, retryAfterS);
}

/** GET as JSON. */
export async function getJson(path, key, signal) {
  const response = await ask(path, { headers: key ? { Authorization: `Bearer ${key}` } : {}, signal });
  return response.json();
}

/** The chunks of a streamed chat answer, each with when it was read (`at`, ms). Aborting `signal` closes the connection, which stops the engine. */
export async function* streamChat(body, key, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const options = { method: "POST", headers: headers(key), body: JSON.stringify(whole), signal };
  const response = await ask("v1/chat/completions", options);
  for await (const { data, at } of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code, chunk.error.message);
    yield { chunk, at };
  }
  throw new ApiError("connection_lost");
}

/** The data of each server-sent event; ends where the connection does. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("connection_lost", error.message);
    }
    if (part.done) return;
    const at = performance.now();
    const found = (rest + part.value).split("\n\n");
    rest = found.pop();
    for (const event of found) if (event.startsWith("data: ")) yield { data: event.slice(6), at };
  }
}
