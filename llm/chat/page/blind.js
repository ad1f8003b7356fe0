// Two models without their names, until the vote.

import { add, ask, at, events, whenSent } from "/page/page.js";

const sides = [at("left"), at("right")], buttons = [...at("vote").children];
let id = null;  // of the answers, which the server knows the models of

function clear() {
  for (const side of sides) {
    side.classList.remove("chosen");
    side.querySelector("bdi").textContent = "";
    while (side.children.length > 1) side.lastChild.remove();
  }
  for (const button of buttons) { button.disabled = true; button.classList.remove("chosen"); }
  id = null;
}

whenSent(async (text, signal) => {
  clear();
  at("prompt").textContent = text;
  const lines = sides.map(side => add(side, "assistant", ""));
  try {
    const response = await ask("/blind/answers", { messages: [{ role: "user", content: text }],
      temperature: +at("temperature").value, max_tokens: +at("tokens").value }, signal);
    let finished = null;
    for await (const event of events(response)) {
      if (event.id) { id = event.id; continue; }
      sides.forEach((side, place) => {
        lines[place].textContent += event[side.id];
        side.scrollTop = side.scrollHeight;
      });
      finished = event.finished;
    }
    if (!finished) throw new Error("the answers broke off: there is nothing to vote on");
    finished.forEach((how, place) => how === "length" && add(sides[place], "speed", "cut: there were no more tokens"));
    for (const button of buttons) button.disabled = false;
  } catch (error) {
    add(sides[0], "error", error.name === "AbortError" ? "stopped: there is nothing to vote on" : error.message);
  }
});

for (const button of buttons) button.addEventListener("click", async () => {
  const asked = id;
  for (const one of buttons) one.disabled = true;
  try {
    const shown = await (await ask("/blind/votes", { id, vote: button.value })).json();
    summarize(shown.summary);
    if (asked !== id) return;  // the next prompt was sent meanwhile
    for (const side of sides) {
      side.querySelector("bdi").textContent = shown[side.id];
      side.classList.toggle("chosen", side.id === button.value);
    }
    button.classList.add("chosen");
    at("text").focus();
  } catch (error) {
    if (asked !== id) return;
    add(sides[0], "error", error.message);
    for (const one of buttons) one.disabled = false;
  }
});

async function showLeader() {
  if (at("tally").open) at("words").textContent = (await (await ask("/blind/tally")).json()).words;
}

function summarize(text) {
  at("summary").textContent = text + " · which leads?";
  showLeader();
}

at("tally").addEventListener("toggle", showLeader);
summarize((await (await ask("/blind/summary")).json()).summary);
