// Requests to the service that this page comes from.

import {byId} from "./dom.js";

const UNREACHABLE = "The service cannot be reached.";
const KEY_REQUIRED = "The service requires an API key.";
const KEY_REFUSED = "The service does not accept this API key.";

export let models = [];       // names of the models that classify texts, the default one first
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
  const names = Object.keys(info.models);
  const variants = names.map(name => `${name} (${info.models[name].variant})`);
  showState(info.state === "ready" ? "good" : "waiting", `${info.state}: ${variants.join(", ")}`);
  return classifiers(names, name => info.models[name].tasks);
}

// Of the listed models, those that classify texts.
function classifiers(names, tasksOf) {
  const found = names.filter(name => tasksOf(name).includes("classification"));
  labelTokens = names.length > found.length;
  return found;
}

async function listModels() {
  const listed = await (await call("v1/models")).json();
  showState("good", `ready: ${listed.data.map(model => model.id).join(", ")}`);
  const tasks = Object.fromEntries(listed.data.map(model => [model.id, model.tasks]));
  return classifiers(Object.keys(tasks), name => tasks[name]);
}

function showState(kind, textContent) {
  byId("state").className = kind;
  if (byId("state").textContent !== textContent) byId("state").textContent = textContent;
}
