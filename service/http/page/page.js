// Classifies typed texts or a file with every loaded model, and draws the results and the latency.
// The page loads nothing from another host, and there is no build step.

const SHOWN_LABELS = 5;       // labels drawn before the button for all of them
const BATCH_TEXTS = 32;       // texts of a file in one request
const MAX_TEXTS = 2000;       // texts of a file
const TYPING_PAUSE_MS = 400;  // time after the last key until a text is sent by itself
const REFRESH_MS = 5000;      // time between two reads of /metrics
const WINDOW_MS = 60000;      // time that the latency table covers

const byId = id => document.getElementById(id);
const form = byId("form"), text = byId("text"), answers = byId("answers"), table = byId("table");
let models = [];              // names of the loaded models
let latestTurn = 0;           // number of the latest classification; older ones draw nothing
let typingTimer = 0;

function create(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function showMessage(message, isError = false) {
  byId("message").textContent = message;
  byId("message").classList.toggle("error", isError);
}

function headers() {
  const key = byId("key").value;
  const json = {"content-type": "application/json"};
  return key ? {...json, authorization: `Bearer ${key}`} : json;
}

async function call(path, options = {}) {
  const response = await fetch(path, {headers: headers(), ...options});
  if (response.status === 401) {
    byId("key-row").hidden = false;
    byId("key").focus();
  }
  return response;
}

async function classify(model, input) {
  const started = performance.now();
  const body = JSON.stringify({model, input});
  const response = await call("v1/classify", {method: "POST", body});
  const answer = await response.json();
  if (!response.ok) {
    throw new Error(answer.error?.message ?? `The service answered ${response.status}.`);
  }
  const timing = parseTiming(response.headers.get("server-timing") ?? "");
  return {results: answer.data, timing, elapsedMs: performance.now() - started};
}

function parseTiming(header) {
  const metrics = header.matchAll(/(\w+);dur=([\d.]+)/g);
  return Object.fromEntries([...metrics].map(([, name, ms]) => [name, Number(ms)]));
}

// One text, every model

async function classifyText() {
  clearTimeout(typingTimer);
  const input = text.value;
  if (!input.trim()) {
    answers.replaceChildren();
    showMessage("");
    return;
  }
  const turn = ++latestTurn;
  table.hidden = true;
  showMessage("…");
  try {
    if (!models.length) await loadModels();  // the text may come before the first answer of /info
    const cards = [];
    for (const model of models) {  // in turn: otherwise the second one's time includes the first's
      const {results, timing, elapsedMs} = await classify(model, input);
      if (turn !== latestTurn) return;  // a later text is under way
      cards.push(card(model, results[0], timing, elapsedMs));
    }
    answers.replaceChildren(...cards);
    showMessage("");
  } catch (error) {
    if (turn === latestTurn) showMessage(error.message, true);
  }
}

function card(model, result, timing, elapsedMs) {
  const all = result.scores;
  const list = create("div");
  const draw = count => list.replaceChildren(...all.slice(0, count).map(score => row(score, result)));
  draw(SHOWN_LABELS);
  const buttons = [];
  if (all.length > SHOWN_LABELS) {
    const textContent = `all ${all.length} labels`;
    const onclick = event => { draw(all.length); event.target.remove(); };
    buttons.push(create("button", {type: "button", textContent, onclick}));
  }
  const facts = create("p", {className: "facts"}, `${result.tokens} tokens`);
  if (result.truncated) {
    const textContent = "truncated to the model's length";
    facts.append(" · ", create("span", {className: "truncated", textContent}));
  }
  const heading = create("h2", {},
    create("span", {textContent: model}),
    create("span", {className: "answer", textContent: bestLabel(result)}));
  return create("article", {className: "card"},
    heading, list, ...buttons, facts, ...stages(timing, elapsedMs));
}

function bestLabel(result) {
  if (result.labels) return result.labels.join(", ") || "none";
  return result.num_classes > 1 ? result.label : result.score.toPrecision(4);
}

function row({label, score}, result) {
  const isNumber = result.num_classes <= 1;
  const share = isNumber ? 0 : Math.max(0, Math.min(1, score));
  const bar = create("div", {className: "bar"});
  bar.style.width = `${100 * share}%`;
  const shown = isNumber ? score.toPrecision(5) : `${(100 * score).toFixed(2)} %`;
  return create("div", {className: label === result.label ? "label best" : "label"},
    create("span", {textContent: label}),
    create("div", {className: "track"}, bar),
    create("span", {textContent: shown}));
}

function stages(timing, elapsedMs) {
  const {tokenize = 0, queue = 0, inference = 0, total = 0} = timing;
  const other = Math.max(0, total - tokenize - queue - inference);
  const bar = create("div", {className: "stages", role: "img", ariaLabel: "time by stage"});
  const legend = create("ul", {className: "legend"});
  for (const [name, ms] of Object.entries({tokenize, queue, inference, other})) {
    const stage = create("div", {className: name});
    stage.style.flexGrow = ms;
    bar.append(stage);
    legend.append(create("li", {}, create("i", {className: name}), `${name} ${ms.toFixed(2)} ms`));
  }
  legend.append(create("li", {textContent: `in the browser ${elapsedMs.toFixed(1)} ms`}));
  return [bar, legend];
}

// A file, one text per line

async function classifyLines(lines) {
  const turn = ++latestTurn;
  const texts = lines.map(line => line.trim()).filter(Boolean).slice(0, MAX_TEXTS);
  if (!texts.length) {
    showMessage("The file contains no text.", true);
    return;
  }
  answers.replaceChildren();
  if (!models.length) await loadModels();
  const body = create("tbody");
  const headings = ["text", ...models].map(textContent => create("th", {scope: "col", textContent}));
  const head = create("thead", {}, create("tr", {}, ...headings));
  table.replaceChildren(create("table", {}, head, body));
  table.hidden = false;
  try {
    for (let start = 0; start < texts.length; start += BATCH_TEXTS) {
      const batch = texts.slice(start, start + BATCH_TEXTS);
      const byModel = [];
      for (const model of models) byModel.push((await classify(model, batch)).results);
      if (turn !== latestTurn) return;
      body.append(...batch.map((line, i) => lineRow(line, byModel.map(results => results[i]))));
      showMessage(`${Math.min(start + BATCH_TEXTS, texts.length)} of ${texts.length} texts`);
    }
    if (lines.length > MAX_TEXTS) showMessage(`the first ${MAX_TEXTS} texts of ${lines.length}`);
  } catch (error) {
    showMessage(error.message, true);
  }
}

function lineRow(line, results) {
  const differ = results.some(result => result.label !== results[0].label);
  const cells = results.map(({label, score, truncated}) => {
    const textContent = `${label} ${score.toFixed(4)}${truncated ? " (truncated)" : ""}`;
    return create("td", {textContent});
  });
  const cell = create("td", {textContent: line});
  return create("tr", {className: differ ? "differ" : ""}, cell, ...cells);
}

async function classifyFile(file) {
  if (file) await classifyLines((await file.text()).split(/\r?\n/));
}

// Latency over the last minute, from the differences of the histograms in /metrics

const samples = [];

const BUCKET = new RegExp(
  String.raw`^drbert_request_duration_seconds_bucket\{(?=[^}]*model="((?:[^"\\]|\\.)*)")`
  + String.raw`(?=[^}]*le="([^"]+)")[^}]*\} (\S+)$`, "gm");

function parseBuckets(page) {
  const byModel = {};
  for (const [, model, bound, count] of page.matchAll(BUCKET)) {
    const upper = bound === "+Inf" ? Infinity : Number(bound);
    (byModel[model] ??= []).push([upper, Number(count)]);
  }
  return byModel;
}

function quantile(buckets, before, q) {
  const counts = buckets.map(([bound, count], i) => [bound, count - (before?.[i]?.[1] ?? 0)]);
  const rank = q * counts.at(-1)[1];
  if (rank <= 0) return null;
  let low = 0, below = 0;
  for (const [bound, count] of counts) {
    if (count >= rank) {
      if (bound === Infinity) return low;
      return low + (bound - low) * (rank - below) / Math.max(1, count - below);
    }
    [low, below] = [bound, count];
  }
}

function latencyRow(model, latest, oldest) {
  const buckets = latest.models[model];
  const before = samples.length > 1 ? oldest.models[model] : undefined;
  const count = buckets.at(-1)[1] - (before?.at(-1)?.[1] ?? 0);
  const ms = q => {
    const seconds = quantile(buckets, before, q);
    return seconds === null ? "–" : `${(1000 * seconds).toFixed(2)} ms`;
  };
  const rate = before ? (1000 * count / (latest.time - oldest.time)).toFixed(1) : "–";
  const cells = [model, rate, ms(0.5), ms(0.95)];
  return create("tr", {}, ...cells.map(textContent => create("td", {textContent})));
}

async function refreshLatency() {
  try {
    const response = await call("metrics");
    if (!response.ok) {
      byId("live").hidden = true;
      return;
    }
    const latest = {time: Date.now(), models: parseBuckets(await response.text())};
    samples.push(latest);
    while (samples.length > 2 && latest.time - samples[1].time >= WINDOW_MS) samples.shift();
    const rows = models.filter(model => latest.models[model])
      .map(model => latencyRow(model, latest, samples[0]));
    byId("live").querySelector("tbody").replaceChildren(...rows);
  } catch { /* the service restarts or has stopped, and #state shows it */ }
}

async function loadModels() {
  try {
    const response = await call("info");
    if (response.status === 401) {
      byId("state").textContent = "an API key is required";
      return;
    }
    const info = await response.json();
    models = Object.keys(info.models);
    const names = models.map(name => `${name} (${info.models[name].variant})`);
    byId("state").textContent = `${info.state}: ${names.join(", ")}`;
  } catch {
    byId("state").textContent = "not reachable";
  }
}

function curlCommand() {
  const input = text.value || text.placeholder;
  const quoted = JSON.stringify({input}).replaceAll("'", `'\\''`);
  const key = byId("key").value ? ` -H 'Authorization: Bearer …'` : "";
  return `curl -s${key} ${new URL("v1/classify", location.href)} -d '${quoted}'`;
}

async function copy(command) {
  try {
    await navigator.clipboard.writeText(command);
    showMessage("copied");
  } catch {
    showMessage(command);  // without HTTPS, browsers do not let a page write to the clipboard
  }
}

form.addEventListener("submit", event => {
  event.preventDefault();
  classifyText();
});
text.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    classifyText();
  }
});
text.addEventListener("input", () => {
  clearTimeout(typingTimer);
  typingTimer = setTimeout(classifyText, TYPING_PAUSE_MS);
});
byId("key").addEventListener("change", async () => {
  await loadModels();
  classifyText();
});
byId("curl").addEventListener("click", () => copy(curlCommand()));
byId("pick").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", event => classifyFile(event.target.files[0]));
for (const [type, isOver] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(type, event => {
    event.preventDefault();
    text.classList.toggle("drop", isOver);
  });
}
document.addEventListener("drop", event => {
  const [file] = event.dataTransfer.files;
  if (file) {
    classifyFile(file);
    return;
  }
  text.value = event.dataTransfer.getData("text");
  classifyText();
});

await loadModels();
refreshLatency();
setInterval(refreshLatency, REFRESH_MS);
setInterval(loadModels, 6 * REFRESH_MS);
if (new URLSearchParams(location.search).has("text")) {
  text.value = new URLSearchParams(location.search).get("text");
  classifyText();
}
