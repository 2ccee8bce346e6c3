// The playground: asks the server for completions, shows tokens as they come, and how each was chosen.
// The output of a model is inserted as text, never as HTML.

import { startChat } from "./chat.js";
import { copyOn, drawSeed, element, events, get, pick, post, sampling, startOptions } from "./common.js";

const panes = [];
let models = [];
let looking = null; // the token whose details are shown: its pane, its place, and the server's answer

// ---- tokens as text ----

// The bytes of a token that the server sends as text, or as "bytes:\xe4…" if it is not valid UTF-8.
function bytesOf(token) {
  const parts = token.startsWith("bytes:\\x") ? token.matchAll(/\\x([0-9a-f]{2})/g) : null;
  return parts ? Uint8Array.from(parts, (part) => parseInt(part[1], 16)) : new TextEncoder().encode(token);
}

// A token with its spaces and line ends visible.
const visible = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)} %`;

// Tokens as spans; part of a character is shown with the token that completes it.
function tokenSpans(tokens, decoder) {
  return tokens.map((token) => {
    const text = decoder.decode(bytesOf(token), { stream: true });
    const span = element("span", "token", text);
    span.classList.toggle("line", /^\n/.test(text));
    span.classList.toggle("part", text === "");
    return span;
  });
}

// ---- panes: a model and what it wrote ----

function addPane() {
  const root = pick("pane").content.firstElementChild.cloneNode(true);
  const pane = { root, model: root.querySelector(".model"), status: root.querySelector(".status") };
  pane.tokens = root.querySelector(".tokens");
  for (const model of models) pane.model.add(new Option(model.id));
  pane.model.selectedIndex = Math.min(panes.length, models.length - 1);
  pane.model.onchange = () => describe(pane);
  copyOn(root.querySelector(".copy"), () => pane.text);
  pane.tokens.onclick = (event) => choose(pane, Number(event.target.dataset.place));
  pane.tokens.onkeydown = (event) => walk(pane, event);
  panes.push(pane);
  pick("panes").append(root);
  clear(pane);
  describe(pane);
}

function describe(pane) {
  const { n_weight, n_layer, n_head, block_size } = models[pane.model.selectedIndex];
  setStatus(pane, `${n_weight.toLocaleString("en")} weights, ${n_layer} layers of ${n_head} heads, context ${block_size}`);
}

function setStatus(pane, text, isWrong = false) {
  pane.status.textContent = text;
  pane.status.classList.toggle("wrong", isWrong);
}

function clear(pane) {
  Object.assign(pane, { ids: [], nPrompt: 0, nHidden: 0, spans: [], text: "", decoder: new TextDecoder(), name: null });
  pane.tokens.replaceChildren();
  if (looking?.pane === pane) {
    looking.stopper.abort();
    looking = null;
    pick("look").hidden = true;
  }
}

// Let a model, that of the pane if none is named, continue a text, or ids, the first nHidden of which are not shown.
async function write(pane, prompt, nHidden, name = pane.model.value) {
  pane.stopper?.abort();
  const stopper = new AbortController();
  const isOld = () => pane.stopper !== stopper; // another run has taken over the pane
  pane.stopper = stopper;
  pane.root.ariaBusy = "true"; // so that a screen reader reads the finished text, not each token
  setStatus(pane, "waiting");
  showState();
  const begun = performance.now();
  let reason = "stopped";
  let isBegun = false;
  try {
    const asked = { model: name, prompt, ...sampling(), stream: true, echo: true, logprobs: 0, return_token_ids: true };
    const response = await post("/v1/completions", asked, stopper.signal);
    for await (const event of events(response)) {
      if (isOld()) return;
      if (!isBegun) { // the old text stays until there is a new one
        isBegun = true;
        clear(pane);
        Object.assign(pane, { nHidden, name });
        pane.root.classList.add("writing");
      }
      const [choice] = event.choices;
      receive(pane, choice);
      reason = choice.finish_reason ?? reason;
      const n = pane.ids.length - pane.nPrompt;
      setStatus(pane, `${n} tokens, ${Math.round((1000 * n) / (performance.now() - begun))} a second`);
    }
    if (isOld()) return;
    setStatus(pane, `${pane.status.textContent}, ${reason === "length" ? "at its full length" : "at its end"}`);
  } catch (error) {
    if (isOld()) return;
    if (error.name === "AbortError") setStatus(pane, `${isBegun ? pane.ids.length - pane.nPrompt : 0} tokens, stopped`);
    else setStatus(pane, error.message, true);
  }
  pane.stopper = null;
  pane.root.classList.remove("writing");
  pane.root.ariaBusy = "false";
  showState();
}

// Insert a new part; the first one also has the prompt.
function receive(pane, { token_ids, prompt_token_ids, logprobs }) {
  if (prompt_token_ids) {
    pane.ids = [...prompt_token_ids];
    pane.nPrompt = prompt_token_ids.length;
    pane.nHidden ||= pane.nPrompt - (logprobs.tokens.length - token_ids.length); // added by the server
  }
  pane.ids.push(...token_ids);
  const first = pane.ids.length - logprobs.tokens.length;
  const spans = tokenSpans(logprobs.tokens, pane.decoder);
  spans.forEach((span, i) => addToken(pane, span, first + i, logprobs.token_logprobs[i]));
}

function addToken(pane, span, place, logprob) {
  if (place < pane.nHidden) return;
  span.classList.toggle("read", place < pane.nPrompt);
  span.classList.toggle("start", place === 0);
  if (logprob !== null) {
    span.style.setProperty("--share", Math.min(1, -logprob / 7));
    span.title = percent(Math.exp(logprob));
  }
  if (place > 0) {
    span.dataset.place = place;
    span.setAttribute("role", "button");
    span.tabIndex = pane.spans.length ? -1 : 0; // Tab stops at one token only; arrow keys move on
    pane.spans.push(span);
  }
  pane.text += span.textContent;
  pane.tokens.append(span);
}

function walk(pane, event) {
  const at = pane.spans.indexOf(document.activeElement); // -1: none has the focus yet
  const last = pane.spans.length - 1;
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last, Enter: at, " ": at }[event.key];
  if (to === undefined || !pane.spans.length) return;
  event.preventDefault();
  const span = pane.spans[Math.max(0, Math.min(last, to))];
  span.focus();
  choose(pane, Number(span.dataset.place));
}

function showState() {
  const isWriting = panes.some((pane) => pane.stopper);
  pick("stop").disabled = !isWriting;
  pick("onward").disabled = isWriting || !panes.some((pane) => pane.ids.length);
  for (const pane of panes) pane.tokens.classList.toggle("shaded", pick("shade").checked);
}

// ---- details of a token ----

async function choose(pane, place) {
  if (!place) return;
  looking?.stopper.abort();
  const mine = { pane, place, stopper: new AbortController() };
  looking = mine;
  for (const each of panes) {
    for (const span of each.spans) {
      const isChosen = each === pane && Number(span.dataset.place) === place;
      span.classList.toggle("chosen", isChosen);
      if (each === pane) span.tabIndex = isChosen ? 0 : -1;
    }
  }
  const prompt = pane.ids.slice(0, Math.min(place, pane.nPrompt));
  const text = pane.ids.slice(pane.nPrompt, Math.max(place, pane.nPrompt));
  try {
    const response = await post("/look", { model: pane.name, prompt, text, taken: pane.ids[place] }, mine.stopper.signal);
    mine.found = await response.json();
    if (looking === mine) show(mine);
  } catch (error) {
    if (error.name !== "AbortError") setStatus(pane, error.message, true);
  }
}

function show({ pane, place, found }) {
  const taken = found.alternatives.find(({ id }) => id === pane.ids[place]);
  pick("chosen").textContent = `${visible(taken.token)} had ${percent(taken.p)}`;
  pick("alternatives").replaceChildren(...found.alternatives.map((one) => alternative(pane, place, one)));
  const was = [pick("layer").value, pick("head").value];
  fill(pick("layer"), found.attention.length, was[0]);
  fill(pick("head"), found.attention[0].length, was[1]);
  pick("heads").style.gridTemplateColumns = `repeat(${found.attention[0].length}, 1fr)`;
  pick("heads").replaceChildren(...found.attention.flatMap((heads, l) => heads.map((row, h) => headButton(l, h, row))));
  if (pick("look").hidden) {
    pick("look").hidden = false;
    pick("look").scrollIntoView({ block: "nearest" });
  }
  showAttention();
}

// A button for a head, labelled with the token it attended to most; pressed again, it returns to the mean of all heads.
function headButton(layer, head, weights) {
  const most = Math.max(...weights);
  const token = visible(looking.found.tokens[weights.indexOf(most)]);
  const button = element("button", "", token);
  button.type = "button";
  button.title = `layer ${layer}, head ${head}: ${token} ${percent(most)}`;
  button.style.setProperty("--share", most);
  button.onclick = () => {
    const isOn = button.ariaPressed === "true";
    [pick("layer").value, pick("head").value] = isOn ? ["", ""] : [layer, head];
    showAttention();
  };
  return button;
}

function alternative(pane, place, { id, token, p }) {
  const item = element("li");
  const button = element("button", id === pane.ids[place] ? "taken" : "");
  const bar = element("span", "bar");
  bar.style.width = `${100 * p}%`;
  button.type = "button";
  button.append(bar, element("span", "name", visible(token)), element("span", "share", percent(p)));
  button.onclick = () => {
    pane.tokens.focus();
    drawSeed();
    write(pane, [...pane.ids.slice(0, place), id], pane.nHidden, pane.name);
  };
  item.append(button);
  return item;
}

function fill(select, count, was) {
  select.replaceChildren(new Option("mean of all", ""), ...Array.from({ length: count }, (_, i) => new Option(i, i)));
  select.value = was < count ? was : "";
}

function showAttention() {
  if (!looking?.found) return; // another token was chosen, and the server has not answered yet
  const { tokens, attention } = looking.found;
  const [layer, head] = [pick("layer").value, pick("head").value];
  const layers = layer === "" ? attention : [attention[layer]];
  const rows = layers.flatMap((heads) => (head === "" ? heads : [heads[head]]));
  const weights = tokens.map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
  const most = Math.max(...weights);
  const spans = tokenSpans(tokens, new TextDecoder());
  spans.forEach((span, i) => {
    span.style.setProperty("--share", weights[i] / most);
    span.title = percent(weights[i]);
  });
  pick("attention").replaceChildren(...spans);
  [...pick("heads").children].forEach((button, i) => {
    const [l, h] = [Math.floor(i / attention[0].length), i % attention[0].length];
    button.ariaPressed = String((layer === "" || Number(layer) === l) && (head === "" || Number(head) === h) && layer + head !== "");
  });
  const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a]).slice(0, 3);
  pick("most").textContent = `Most at ${order.map((i) => `${visible(tokens[i])} (${percent(weights[i])})`).join(", ")}`;
}

// ---- start ----

const isChat = () => location.hash === "#chat";

// Show the tab that the address names.  Both tabs share the options.
function showTab() {
  for (const tab of document.querySelectorAll("nav a")) {
    const isOpen = (tab.hash === "#chat") === isChat();
    tab.ariaCurrent = isOpen ? "page" : null;
    pick(tab.dataset.shows).hidden = !isOpen;
  }
  pick(isChat() ? "chat-options" : "write-options").append(pick("sampling"));
  pick(isChat() ? "line" : "prompt").focus({ preventScroll: true });
}
onhashchange = showTab;

function showPanes() {
  if (panes.length < 2 && pick("compare").checked) addPane();
  panes.forEach((pane, i) => { pane.root.hidden = i > 0 && !pick("compare").checked; });
  showState();
}

const shown = () => panes.filter((pane) => !pane.root.hidden);
const stop = () => panes.forEach((pane) => pane.stopper?.abort());

async function start() {
  startOptions();
  models = (await (await get("/v1/models")).json()).data;
  addPane();
  pick("compare").checked = models.length > 1;
  showPanes();
  pick("ask").onsubmit = (event) => {
    event.preventDefault();
    drawSeed();
    shown().forEach((pane) => write(pane, pick("prompt").value, 0));
  };
  pick("stop").onclick = stop;
  pick("onward").onclick = () => {
    drawSeed();
    for (const pane of shown().filter(({ ids }) => ids.length)) {
      const isSame = pane.name === pane.model.value; // another model may have other ids
      write(pane, isSame ? pane.ids : pane.text, isSame ? pane.nHidden : 0);
    }
  };
  pick("compare").onchange = showPanes;
  pick("shade").onchange = showState;
  pick("layer").onchange = pick("head").onchange = showAttention;
  document.onkeydown = (event) => {
    if (event.key === "Escape") isChat() ? pick("silence").click() : stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) pick(isChat() ? "say" : "ask").requestSubmit();
  };
  startChat(models);
  for (const tab of document.querySelectorAll("fieldset")) tab.disabled = false;
  showTab();
}

start().catch((error) => {
  pick("error").textContent = `The server cannot be used: ${error.message}`;
  pick("error").hidden = false;
});
