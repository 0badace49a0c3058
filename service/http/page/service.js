// Requests to the service that this page comes from.

import {byId} from "./dom.js";

const UNREACHABLE = "The service cannot be reached.";
const KEY_REQUIRED = "The service requires an API key.";
const KEY_REFUSED = "The service does not accept this API key.";

export let models = [];       // names of what classifies texts, the default model first
export let counted = [];      // the names under which the metrics count their requests
let labelTokens = false;      // whether there are models that label tokens, which this page does not show
export let isLocked = false;  // whether the last request that needs a key was refused for it

function headers() {
  const key = byId("key").value;
  const json = {"content-type": "application/json"};
  return key ? {...json, authorization: `Bearer ${key}`} : json;
}

export async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, {headers: headers(), ...options});
  } catch {
    throw new Error(UNREACHABLE);
  }
  if (response.status === 401) byId("key-row").hidden = false;  // the focus stays where someone is typing
  return response;
}

export async function classify(request) {
  const started = performance.now();
  const response = await call("v1/classify", {method: "POST", body: JSON.stringify(request)});
  isLocked = response.status === 401;
  if (isLocked) throw new Error(keyMessage());
  const answer = await response.json().catch(() => ({}));
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

const keyMessage = () => byId("key").value ? KEY_REFUSED : KEY_REQUIRED;

// Why no model can be asked; an empty text if one can.
export function reasonWithoutModels(chosen) {
  if (chosen.length) return "";
  if (models.length) return "Choose a model in the options.";
  if (labelTokens && !isLocked) return "The loaded models label tokens; ask POST /tokens.";
  return isLocked ? keyMessage() : "The service has told no model yet.";
}

// Reads the list of models, shows the state, and returns whether the list has changed.
export async function loadModels() {
  try {
    const response = await call("info");
    isLocked = response.status === 401;
    if (isLocked) {
      showState("waiting", keyMessage());
      return false;
    }
    // A proxy may keep /info for the inside.
    const names = response.ok ? showInfo(await response.json()) : await listModels();
    const changed = names.join("\n") !== models.join("\n");
    models = names;
    return changed;
  } catch {
    showState("bad", "not reachable");
    return false;
  }
}

function showInfo(info) {
  const all = Object.entries(info.models);
  const variants = all.map(([name, model]) => `${name} (${model.variant})`);
  showState(info.state === "ready" ? "good" : "waiting", `${info.state}: ${variants.join(", ")}`);
  return classifiers(all.map(([name, {tasks, heads}]) => ({name, tasks, heads: Object.keys(heads ?? {})})));
}

// The names of those that classify texts; each head of a model with several is asked by itself.
function classifiers(all) {
  const chosen = all.filter(({tasks}) => tasks.includes("classification"));
  labelTokens = all.length > chosen.length;
  counted = chosen.map(({name}) => name);
  return chosen.flatMap(({name, heads}) => heads.length ? heads.map(head => `${name}/${head}`) : [name]);
}

async function listModels() {
  const listed = await (await call("v1/models")).json();
  showState("good", `ready: ${listed.data.map(model => model.id).join(", ")}`);
  const all = listed.data.filter(({heads}) => heads !== null);  // the heads themselves have none
  return classifiers(all.map(({id, tasks, heads}) => ({name: id, tasks, heads: heads ?? []})));
}

function showState(kind, textContent) {
  byId("state").className = kind;
  if (byId("state").textContent !== textContent) byId("state").textContent = textContent;
}
