// Types or drops texts, asks every model, draws what they say. No network but the service's own, no build.

const SHOWN = 5;              // labels drawn before "all of them" is asked for
const AT_ONCE = 32;           // texts of a file in one request
const MOST = 2000;            // texts of a file
const PAUSE_MS = 400;         // after the last key before a text is sent by itself
const LOOK_MS = 5000, OVER_MS = 60000;

const at = id => document.getElementById(id);
const [form, text, said, answers, table] = ["form", "text", "said", "answers", "table"].map(at);
let models = [], asked = 0, pause = 0;

function made(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function say(words, wrong = false) {
  said.textContent = words;
  said.classList.toggle("wrong", wrong);
}

function headers() {
  const key = at("key").value;
  return key ? {"content-type": "application/json", authorization: `Bearer ${key}`} : {"content-type": "application/json"};
}

async function call(path, options = {}) {
  const answer = await fetch(path, {headers: headers(), ...options});
  if (answer.status === 401) {
    at("key-row").hidden = false;
    at("key").focus();
  }
  return answer;
}

async function classify(model, input) {
  const began = performance.now();
  const answer = await call("v1/classify", {method: "POST", body: JSON.stringify({model, input})});
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error?.message ?? `The service answered ${answer.status}.`);
  return {told, timing: timingOf(answer.headers.get("server-timing") ?? ""), took: performance.now() - began};
}

function timingOf(header) {
  return Object.fromEntries([...header.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]));
}

// One text, every model

async function ask() {
  clearTimeout(pause);
  const input = text.value;
  if (!input.trim()) { answers.replaceChildren(); say(""); return; }
  const turn = ++asked;
  table.hidden = true;
  say("…");
  try {
    if (!models.length) await meet();     // asked before it was told what there is
    const cards = [];
    for (const model of models) {     // in turn: asked together, the second would be shown waiting for the first
      const {told, timing, took} = await classify(model, input);
      if (turn !== asked) return;     // a later text is under way
      cards.push(card(model, told.data[0], timing, took));
    }
    answers.replaceChildren(...cards);
    say("");
  } catch (error) {
    if (turn === asked) say(error.message, true);
  }
}

function card(model, one, timing, took) {
  const all = [...one.scores];
  const list = made("div");
  const draw = most => list.replaceChildren(...all.slice(0, most).map(score => row(score, one)));
  draw(SHOWN);
  const more = all.length > SHOWN ? [made("button", {type: "button", textContent: `all ${all.length} labels`, onclick() { draw(all.length); this.remove(); }})] : [];
  const facts = made("p", {className: "facts"}, `${one.tokens} tokens`);
  if (one.truncated) facts.append(" · ", made("span", {className: "cut", textContent: "cut to the model's length"}));
  const best = one.labels ? one.labels.join(", ") || "none" : one.num_classes > 1 ? one.label : one.score.toPrecision(4);
  return made("article", {className: "card"}, made("h2", {}, made("span", {textContent: model}), made("span", {className: "answer", textContent: best})), list, ...more, facts, ...split(timing, took));
}

function row({label, score}, one) {
  const share = one.num_classes > 1 ? Math.max(0, Math.min(1, score)) : 0;
  const bar = made("div", {className: "bar"});
  bar.style.width = `${100 * share}%`;
  const shown = one.num_classes > 1 ? `${(100 * score).toFixed(2)} %` : score.toPrecision(5);
  return made("div", {className: label === one.label ? "label best" : "label"},
    made("span", {textContent: label}), made("div", {className: "track"}, bar), made("span", {textContent: shown}));
}

function split(timing, took) {
  const {tokenize = 0, queue = 0, inference = 0, total = 0} = timing;
  const parts = {tokenize, queue, inference, other: Math.max(0, total - tokenize - queue - inference)};
  const bar = made("div", {className: "split", role: "img", ariaLabel: "where the time went"});
  const legend = made("ul", {className: "legend"});
  for (const [name, ms] of Object.entries(parts)) {
    const piece = made("div", {className: name});
    piece.style.flexGrow = ms;
    bar.append(piece);
    legend.append(made("li", {}, made("i", {className: name}), `${name} ${ms.toFixed(2)} ms`));
  }
  legend.append(made("li", {textContent: `in the browser ${took.toFixed(1)} ms`}));
  return [bar, legend];
}

// A file, one text a line

async function askAll(lines) {
  const turn = ++asked, texts = lines.map(line => line.trim()).filter(Boolean).slice(0, MOST);
  if (!texts.length) { say("That file holds no text.", true); return; }
  answers.replaceChildren();
  if (!models.length) await meet();
  const body = made("tbody");
  table.replaceChildren(made("table", {}, made("thead", {}, made("tr", {}, ...["text", ...models].map(name => made("th", {scope: "col", textContent: name})))), body));
  table.hidden = false;
  try {
    for (let start = 0; start < texts.length; start += AT_ONCE) {
      const some = texts.slice(start, start + AT_ONCE);
      const found = [];
      for (const model of models) found.push(await classify(model, some));
      if (turn !== asked) return;
      body.append(...some.map((line, i) => {
        const theirs = found.map(({told}) => told.data[i]);
        const differ = theirs.some(one => one.label !== theirs[0].label);
        return made("tr", {className: differ ? "differ" : ""}, made("td", {textContent: line}), ...theirs.map(one => made("td", {textContent: `${one.label} ${one.score.toFixed(4)}${one.truncated ? " (cut)" : ""}`})));
      }));
      say(`${Math.min(start + AT_ONCE, texts.length)} of ${texts.length} texts`);
    }
    if (lines.length > MOST) say(`the first ${MOST} texts of ${lines.length}`);
  } catch (error) {
    say(error.message, true);
  }
}

async function read(file) {
  if (file) await askAll((await file.text()).split(/\r?\n/));
}

// The last minute, from the histograms' differences

const looks = [];

function readMetrics(page) {
  const found = {};
  for (const [, model, bound, count] of page.matchAll(/^drbert_request_duration_seconds_bucket\{(?=[^}]*model="((?:[^"\\]|\\.)*)")(?=[^}]*le="([^"]+)")[^}]*\} (\S+)$/gm)) {
    (found[model] ??= []).push([bound === "+Inf" ? Infinity : Number(bound), Number(count)]);
  }
  return found;
}

function quantile(buckets, before, q) {
  const counts = buckets.map(([bound, count], i) => [bound, count - (before?.[i]?.[1] ?? 0)]);
  const all = counts.at(-1)[1];
  if (all <= 0) return null;
  let low = 0, under = 0;
  for (const [bound, count] of counts) {
    if (count >= q * all) return bound === Infinity ? low : low + (bound - low) * (q * all - under) / Math.max(1, count - under);
    [low, under] = [bound, count];
  }
}

async function look() {
  try {
    const page = await call("metrics");
    if (!page.ok) { at("live").hidden = true; return; }
    const now = {when: Date.now(), models: readMetrics(await page.text())};
    looks.push(now);
    while (looks.length > 2 && now.when - looks[1].when >= OVER_MS) looks.shift();
    const then = looks[0];
    at("live").querySelector("tbody").replaceChildren(...models.filter(model => now.models[model]).map(model => {
      const buckets = now.models[model], before = looks.length > 1 ? then.models[model] : undefined;
      const count = buckets.at(-1)[1] - (before?.at(-1)?.[1] ?? 0);
      const ms = q => { const seconds = quantile(buckets, before, q); return seconds === null ? "–" : `${(1000 * seconds).toFixed(2)} ms`; };
      const rate = before ? (1000 * count / (now.when - then.when)).toFixed(1) : "–";
      return made("tr", {}, ...[model, rate, ms(0.5), ms(0.95)].map(shown => made("td", {textContent: shown})));
    }));
  } catch { /* the service restarts, or is gone: #state says so */ }
}

async function meet() {
  try {
    const answer = await call("info");
    if (answer.status === 401) { at("state").textContent = "a key is wanted"; return; }
    const info = await answer.json();
    models = Object.keys(info.models);
    at("state").textContent = `${info.state}: ${models.map(name => `${name} (${info.models[name].variant})`).join(", ")}`;
  } catch {
    at("state").textContent = "not reachable";
  }
}

function curl() {
  const input = text.value || text.placeholder;
  const quoted = JSON.stringify({input}).replaceAll("'", `'\\''`);
  const key = at("key").value ? ` -H 'Authorization: Bearer …'` : "";
  return `curl -s${key} ${new URL("v1/classify", location.href)} -d '${quoted}'`;
}

async function copy(words) {
  try {
    await navigator.clipboard.writeText(words);
    say("copied");
  } catch {
    say(words);       // without https a browser lets no page write to the clipboard
  }
}

form.addEventListener("submit", event => { event.preventDefault(); ask(); });
text.addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); } });
text.addEventListener("input", () => { clearTimeout(pause); pause = setTimeout(ask, PAUSE_MS); });
at("key").addEventListener("change", async () => { await meet(); ask(); });
at("curl").addEventListener("click", () => copy(curl()));
at("pick").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", event => read(event.target.files[0]));
for (const [kind, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(kind, event => { event.preventDefault(); text.classList.toggle("drop", over); });
}
document.addEventListener("drop", event => {
  const [file] = event.dataTransfer.files;
  if (file) { read(file); return; }
  text.value = event.dataTransfer.getData("text");
  ask();
});

await meet();
look();
setInterval(look, LOOK_MS);
setInterval(meet, 6 * LOOK_MS);
if (new URLSearchParams(location.search).has("text")) {
  text.value = new URLSearchParams(location.search).get("text");
  ask();
}
