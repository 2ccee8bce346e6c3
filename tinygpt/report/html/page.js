// The page of a run or of several: charts, the slider over the evaluations, tokens with their alternatives, attention.
// What comes from a model or a text is put in as text, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const pick = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// A token as a name: spaces and line ends can be seen.
const visible = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)} %`;

// ---- charts ----

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const checked = (id) => pick(id).checked;

// Each value as the mean of n rows around it, within its own series.
function smoothed(rows, n) {
  const half = Math.floor(n / 2);
  return rows.map((row, at) => {
    const near = rows.slice(Math.max(0, at - half), at + half + 1);
    const found = near.filter((other) => other.name === row.name && other.train !== null).map((other) => other.train);
    return { ...row, smooth: found.length ? found.reduce((a, b) => a + b) / found.length : null };
  });
}

function datasets(x) {
  const names = [...document.querySelectorAll("#names [aria-pressed='true']")].map((button) => button.textContent);
  const rows = smoothed(data.curve, Number(pick("smooth").value)).map((row) => ({ ...row, dim: names.length > 0 && !names.includes(row.name) }));
  const curve = checked("logx") ? rows.filter((row) => row[x] > 0) : rows; // zero has no logarithm
  return { curve, norms: data.norms ?? [], lengths: data.lengths ?? [] };
}

function themed() {
  const [ink, soft, line] = ["ink", "soft", "line"].map(colour);
  const font = "system-ui, sans-serif";
  return {
    background: "transparent", font, view: { stroke: null },
    axis: { labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12 },
    legend: { labelColor: ink, titleColor: ink, labelFontSize: 13 },
    title: { color: ink, anchor: "start", fontSize: 13, fontWeight: 600 },
  };
}

async function draw(place) {
  const x = pick("x").value;
  const values = {
    $x: x, $xscale: checked("logx") ? "log" : "linear", $yscale: checked("logy") ? "log" : "linear",
    $xzero: checked("logx") ? undefined : false, $yzero: checked("logy") ? undefined : false, // what logarithms have not
    ...Object.fromEntries(["blue", "orange", "green", "ink"].map((name) => [`$${name}`, colour(name)])),
  };
  const spec = JSON.parse(JSON.stringify(data.charts[place.dataset.chart]), (_, value) => (typeof value === "string" && value in values ? values[value] : value));
  place.view?.finalize();
  const options = { actions: false, renderer: "svg", config: themed(), tooltip: { theme: "page" } };
  place.view = await vegaEmbed(place, { ...spec, datasets: datasets(x) }, options);
}

let drawing = Promise.resolve(); // one drawing after the other, and of many changes in one moment only the last
let due = 0;
function drawAll() {
  cancelAnimationFrame(due);
  due = requestAnimationFrame(() => {
    drawing = drawing.catch(() => {}).then(() => Promise.all([...document.querySelectorAll("[data-chart]")].map(draw)));
  });
}

for (const id of data.charts ? ["x", "smooth", "logx", "logy"] : []) {
  pick(id).addEventListener("input", () => {
    pick("smoothed").textContent = pick("smooth").value;
    drawAll();
  });
}
for (const button of document.querySelectorAll("#names button")) {
  button.onclick = () => {
    button.ariaPressed = String(button.ariaPressed !== "true");
    drawAll();
  };
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawAll(); drawHeads(); });

// ---- the text getting better ----

function showEvaluation() {
  const { step, text } = data.evaluations[Number(pick("evaluation").value)];
  const row = data.curve.findLast((found) => found.step <= step && found.seen !== null);
  pick("evaluationstep").textContent = `step ${step.toLocaleString("en")}${row ? `, validation loss ${row.seen.toFixed(3)}` : ""}`;
  pick("evaluationtext").textContent = text;
}

if (pick("evaluation")) {
  pick("evaluation").addEventListener("input", showEvaluation);
  showEvaluation();
}

// ---- tokens ----

const BLANK = 8; // nats from where on a token is as dark as can be

// One row of tokens: one of them has the keyboard's focus, and arrow keys go from one to the next.
function tokenRow(root, spans, show) {
  const choose = (span) => {
    root.querySelector(".chosen")?.classList.remove("chosen");
    for (const other of root.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    span.classList.add("chosen");
    span.tabIndex = 0;
    show(spans.indexOf(span));
  };
  root.append(...spans);
  for (const span of spans) span.tabIndex = -1;
  if (spans.length) spans[0].tabIndex = 0;
  for (const moved of ["pointerover", "focusin"]) {
    root.addEventListener(moved, (event) => { if (spans.includes(event.target)) choose(event.target); });
  }
  root.addEventListener("keydown", (event) => {
    const at = spans.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    spans[to]?.focus();
  });
  return choose;
}

function tokenSpan(text, share, className = "token") {
  const span = element("span", className, text);
  span.style.setProperty("--share", share.toFixed(3));
  span.classList.toggle("part", text === "");
  span.classList.toggle("line", text.startsWith("\n"));
  return span;
}

function showToken({ text, nats, likeliest }) {
  const list = element("ul");
  for (const [name, share] of likeliest) {
    const item = element("li", name === text ? "taken" : "", `${visible(name)} ${percent(share)}`);
    item.style.setProperty("--share", share);
    list.append(item);
  }
  const said = `${percent(Math.exp(-nats))}, surprise ${(nats / Math.LN2).toFixed(1)} bits`;
  pick("token").replaceChildren(element("span", "name", visible(text)), element("span", "hint", said), list);
}

function scoredRow(read, tokens) {
  const root = element("p", "text");
  const all = [...read, ...tokens];
  const spans = all.map((token, at) => tokenSpan(token.text, Math.min(1, token.nats / BLANK), at < read.length ? "token read" : "token"));
  tokenRow(root, spans, (at) => showToken(all[at]));
  return root;
}

function sampleCard({ prompt, read, written, followed }) {
  const card = element("div", followed ? "sample both" : "sample");
  card.append(element("h3", "", prompt ? (followed ? "From the held-out text" : `Prompt: ${prompt}`) : "The beginning of a document"));
  const side = element("div", "side");
  const columns = [["the model", written], ...(followed ? [["what really followed", followed]] : [])];
  for (const [title, tokens] of columns) {
    const column = element("div");
    if (followed) column.append(element("p", "hint", title));
    column.append(scoredRow(read, tokens));
    side.append(column);
  }
  card.append(side);
  return card;
}

pick("samplelist")?.append(...data.samples.map(sampleCard));
pick("longest")?.append(...data.longest.map((token) => element("code", "", visible(token))));
pick("paragraph")?.append(...data.paragraph.map((piece) => element("span", "", piece)));

// ---- attention ----

const maps = data.attention && Uint8Array.from(atob(data.attention.maps), (char) => char.charCodeAt(0));

// The share that token `from` gives to token `to`, of 0 to 1.
function attends(head, from, to) {
  const n = data.attention.shape[3];
  return maps[(head * n + from) * n + to] / 255;
}

function drawHeads() {
  for (const [head, canvas] of document.querySelectorAll("#heads canvas").entries()) {
    const n = data.attention.shape[3];
    canvas.width = canvas.height = n;
    const context = canvas.getContext("2d");
    context.fillStyle = colour("weight");
    for (let from = 0; from < n; from++) {
      for (let to = 0; to <= from; to++) {
        context.globalAlpha = Math.sqrt(attends(head, from, to)); // else all but the largest are too faint to see
        context.fillRect(to, from, 1, 1);
      }
    }
  }
}

function showHeads() {
  const [nLayer, nHead, n] = data.attention.shape;
  pick("heads").style.gridTemplateColumns = `repeat(${nHead}, max-content)`;
  const spans = data.attention.tokens.map((token) => tokenSpan(token, 0));
  let headAt = 0;
  let looking = n - 1;
  const say = (head, from, to) => {
    pick("headname").textContent =
      `Layer ${Math.floor(head / nHead)}, head ${head % nHead}: ${visible(data.attention.tokens[from])} attends to ` +
      `${visible(data.attention.tokens[to])} with ${percent(attends(head, from, to))}`;
  };
  const show = (at) => {
    looking = at;
    const most = spans.map((_, to) => (to <= at ? attends(headAt, at, to) : 0));
    spans.forEach((span, to) => span.style.setProperty("--share", most[to].toFixed(3)));
    say(headAt, at, most.indexOf(Math.max(...most)));
  };
  for (let head = 0; head < nLayer * nHead; head++) {
    const button = element("button");
    button.type = "button";
    button.setAttribute("aria-label", `layer ${Math.floor(head / nHead)}, head ${head % nHead}`);
    button.append(element("canvas"));
    button.onclick = () => {
      headAt = head;
      for (const other of pick("heads").children) other.setAttribute("aria-pressed", String(other === button));
      show(looking);
    };
    button.onpointermove = (event) => {
      const box = button.firstChild.getBoundingClientRect();
      const [to, from] = [(event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height].map((at) => Math.floor(at * n));
      if (0 <= to && to <= from && from < n) say(head, from, to);
    };
    button.setAttribute("aria-pressed", String(head === 0));
    pick("heads").append(button);
  }
  const choose = tokenRow(pick("attended"), spans, show);
  choose(spans[n - 1]);
  drawHeads();
}

if (data.attention) showHeads();

// ---- lines to copy ----

for (const block of document.querySelectorAll(".code")) {
  const button = element("button", "", "Copy");
  button.type = "button";
  button.onclick = async () => {
    const text = block.querySelector("pre");
    getSelection().selectAllChildren(text); // a page from disk may not have a clipboard: then it is marked at least
    try { await navigator.clipboard.writeText(text.textContent); } catch { document.execCommand("copy"); }
    button.textContent = "Copied";
  };
  block.append(button);
}

drawAll();
