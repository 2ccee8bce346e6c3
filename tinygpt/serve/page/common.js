// What both tabs share: the options, and the server.  The output of a model is inserted as text, never as HTML.

export const pick = (id) => document.getElementById(id);
const OPTIONS = [
  // name, minimum, maximum, step of the slider, initial value
  ["temperature", 0, 2, 0.05, 0.8],
  ["top_p", 0.05, 1, 0.05, 0.95],
  ["top_k", 0, 200, 1, 0],
  ["min_p", 0, 1, 0.01, 0],
  ["repetition_penalty", 0.5, 2, 0.05, 1],
  ["frequency_penalty", -2, 2, 0.1, 0],
  ["max_tokens", 1, 500, 1, 120],
];

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- options ----

function addOption([name, least, most, step, start]) {
  const label = element("label", "option");
  const number = element("input");
  Object.assign(number, { type: "number", id: name, value: start, step });
  number.setAttribute("aria-label", name);
  label.append(element("span", "", name.replaceAll("_", " ")));
  const range = element("input");
  Object.assign(range, { type: "range", min: least, max: most, step, value: start, tabIndex: -1 });
  range.setAttribute("aria-hidden", "true");
  range.oninput = () => { number.value = range.value; };
  number.oninput = () => { range.value = number.value; };
  label.append(range, number);
  pick("seeds").before(label);
}

export function startOptions() {
  OPTIONS.forEach(addOption);
  pick("sampling").open = matchMedia("(min-width: 44rem)").matches; // on a phone it would hide the text
  pick("seed").oninput = () => { pick("keep").checked = true; };
  drawSeed();
}

// Draw and show a new seed for each text, unless the user keeps the old one.
export function drawSeed() {
  if (!pick("keep").checked) [pick("seed").value] = crypto.getRandomValues(new Uint32Array(1));
}

export function sampling() {
  const names = ["seed", ...OPTIONS.map(([name]) => name)].filter((name) => pick(name).value !== "");
  const numbers = names.map((name) => [name, Number(pick(name).value)]);
  const stop = pick("stops").value.split("\n").filter(Boolean).map((text) => text.replaceAll("\\n", "\n"));
  return { ...Object.fromEntries(numbers), stop };
}

// Let a button copy a text.  Only local or https pages have a clipboard: elsewhere it is copied from a field.
export function copyOn(button, text) {
  button.onclick = async () => {
    if (navigator.clipboard) await navigator.clipboard.writeText(text());
    else {
      const field = element("textarea", "", text());
      button.after(field);
      field.select();
      document.execCommand("copy");
      field.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
}

// ---- the server ----

export function post(path, document, signal) {
  const headers = { "content-type": "application/json" };
  return get(path, { method: "POST", headers, body: JSON.stringify(document), signal });
}

export async function get(path, options) {
  const response = await fetch(path, options);
  if (!response.ok) {
    const answer = await response.json().catch(() => null); // a proxy's answer may not be JSON
    throw new Error(answer?.error?.message ?? `the server says ${response.status} ${response.statusText}`);
  }
  return response;
}

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server went away");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace("data: ", "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

