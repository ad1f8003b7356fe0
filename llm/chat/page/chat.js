// One model, or several side by side, each with its name.

import { add, ask, at, events, whenSent } from "/page/page.js";

const columns = [];

async function begin() {
  for (const model of (await (await ask("/v1/models")).json()).data) {
    const place = document.createElement("section"), title = document.createElement("h2");
    title.textContent = model.id;
    place.append(title);
    at("columns").append(place);
    columns.push({ model: model.id, place, said: [] });
  }
}

async function answer(column, signal) {
  const line = add(column.place, "assistant", ""), start = performance.now();
  let text = "", pieces = 0, first = 0;
  try {
    const response = await ask("/v1/chat/completions", { model: column.model, messages: column.said, stream: true,
      temperature: +at("temperature").value, max_tokens: +at("tokens").value, seed: column.said.length }, signal);
    for await (const event of events(response)) {
      const piece = event.choices[0].delta.content;
      if (!piece) continue;
      first = first || performance.now() - start;
      pieces += 1;
      line.textContent = text += piece;
      column.place.scrollTop = column.place.scrollHeight;
    }
    column.said.push({ role: "assistant", content: text });
    const rate = pieces / Math.max(1e-3, (performance.now() - start) / 1000);
    add(column.place, "speed", `first after ${(first / 1000).toFixed(2)} s · ${rate.toFixed(1)} pieces/s`);
  } catch (error) {
    if (text) column.said.push({ role: "assistant", content: text }); else column.said.pop();
    if (error.name !== "AbortError") add(column.place, "error", error.message);
  }
}

whenSent(async (text, signal) => {
  for (const column of columns) {
    column.said.push({ role: "user", content: text });
    add(column.place, "user", text);
  }
  await Promise.all(columns.map(column => answer(column, signal)));
});
at("reset").addEventListener("click", () => {
  for (const column of columns) { column.said = []; while (column.place.children.length > 1) column.place.lastChild.remove(); }
});
begin();
