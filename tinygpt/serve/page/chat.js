// The tab for chats: messages go to /v1/chat/completions, and the answer is shown as it is written.

import { copyOn, drawSeed, element, events, pick, post, sampling } from "./common.js";

let models = [];
let talk = []; // {role, content} of each message so far
let stopper = null; // aborts the answer that is being written

export function startChat(found) {
  models = found;
  for (const model of models) pick("chat-model").add(new Option(model.id));
  pick("say").onsubmit = (event) => {
    event.preventDefault();
    if (stopper || !pick("line").value) return;
    if (talk.at(-1)?.role === "user") unsay(); // it got no answer: the new message takes its place
    say("user", pick("line").value);
    pick("line").value = "";
    answer();
  };
  pick("line").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    pick("say").requestSubmit();
  };
  pick("silence").onclick = () => stopper?.abort();
  pick("again").onclick = () => {
    if (talk.at(-1)?.role === "assistant") unsay();
    answer();
  };
  pick("fresh").onclick = () => {
    stopper?.abort();
    stopper = null; // what is written is not of this chat any more
    talk = [];
    pick("talk").replaceChildren();
    setStatus("");
    showButtons();
  };
  copyOn(pick("chat-copy"), () => talk.map(({ role, content }) => `${role}: ${content}`).join("\n\n"));
  showButtons();
}

function say(role, content) {
  const message = { role, content };
  const body = element("p", "", content);
  const item = element("li", role);
  item.append(element("span", "who", role === "user" ? "you" : "model"), body);
  talk.push(message);
  pick("talk").append(item);
  const showLast = () => { pick("talk").scrollTop = pick("talk").scrollHeight; };
  showLast();
  return (piece) => {
    message.content += piece;
    body.append(piece);
    showLast();
  };
}

function unsay() {
  talk.pop();
  pick("talk").lastElementChild.remove();
}

async function answer() {
  const mine = new AbortController();
  stopper = mine;
  drawSeed();
  const system = pick("system").value;
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...talk];
  const model = models[pick("chat-model").selectedIndex];
  setStatus("waiting");
  showButtons();
  let add = null;
  let end = "";
  try {
    const asked = { model: model.id, messages, ...sampling(), stream: true, stream_options: { include_usage: true } };
    const response = await post("/v1/chat/completions", asked, mine.signal);
    for await (const { choices: [choice], usage } of events(response)) {
      if (stopper !== mine) return;
      if (choice) {
        add ??= say("assistant", "");
        add(choice.delta.content ?? "");
        end = choice.finish_reason === "length" ? ", at its full length" : end;
      }
      if (usage) {
        const lost = usage.prompt_tokens > model.block_size ? `, of which the model reads the last ${model.block_size}` : "";
        end = `${usage.completion_tokens} tokens after ${usage.prompt_tokens}${lost}${end}`;
      }
    }
    setStatus(end);
  } catch (error) {
    if (stopper !== mine) return;
    if (error.name === "AbortError") setStatus("stopped");
    else setStatus(error.message, true); // the messages stay: Again asks once more
  }
  stopper = null;
  showButtons();
}

function setStatus(text, isWrong = false) {
  pick("chat-status").textContent = text;
  pick("chat-status").classList.toggle("wrong", isWrong);
}

function showButtons() {
  pick("send").disabled = Boolean(stopper);
  pick("silence").disabled = !stopper;
  pick("again").disabled = Boolean(stopper) || !talk.length;
  pick("fresh").disabled = pick("chat-copy").disabled = !talk.length;
}
