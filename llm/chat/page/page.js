// Shared by both pages: text as people and models write it, answers as they come, and the line to type in.

export const at = id => document.getElementById(id);

export function add(place, kind, text) {
  const line = document.createElement("div");
  line.className = "said " + kind;
  line.dir = "auto";
  line.textContent = text;  // never as HTML
  place.append(line);
  place.scrollTop = place.scrollHeight;
  return line;
}

export async function ask(path, body, signal) {
  const response = await fetch(path, body && { method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body) });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "";;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) if (event !== "data: [DONE]") yield JSON.parse(event.slice(6));
  }
}

export function whenSent(send) {
  let stopping = null;
  at("ask").addEventListener("submit", async event => {
    event.preventDefault();
    const text = at("text").value.trim();
    if (!text || stopping) return;
    at("text").value = "";
    stopping = new AbortController();
    at("stop").disabled = false;
    await send(text, stopping.signal);
    stopping = null;
    at("stop").disabled = true;
  });
  at("text").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("ask").requestSubmit(); }
  });
  at("stop").addEventListener("click", () => stopping && stopping.abort());
}
