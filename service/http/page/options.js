// The options of a request, and the same request for a shell, for Python, and as a link.

import {byId, create} from "./dom.js";
import {models} from "./service.js";

export function drawModels() {
  const unchecked = new Set([...byId("models").querySelectorAll("input:not(:checked)")].map(box => box.value));
  const boxes = models.map(name => {
    const box = create("input", {type: "checkbox", value: name, checked: !unchecked.has(name)});
    return create("label", {}, box, ` ${name}`);
  });
  byId("models").replaceChildren("Models: ", ...boxes);
}

export function chosenModels() {
  return [...byId("models").querySelectorAll("input:checked")].map(box => box.value);
}

// How many labels an answer shows; null for all of them.
export function shownLabels() {
  return byId("top-k").value ? Math.max(1, Number(byId("top-k").value)) : null;
}

// The fields of a request that the options set; none where everything is as usual. The labels are
// cut for display only, because models with the same labels are compared.
export function chosenFields() {
  const fields = {};
  const truncate = byId("truncate").value;
  if (truncate === "window") fields.window = {};
  else if (truncate) fields.truncate = truncate;
  return fields;
}

export function curlCommands() {
  const address = new URL("v1/classify", location.href);
  const key = byId("key").value ? ` -H "Authorization: Bearer $DRBERT_API_KEY"` : "";
  return requests().map(request => {
    const quoted = JSON.stringify(request).replaceAll("'", `'\\''`);
    return `curl --show-error --silent${key} ${address} -d '${quoted}'`;
  }).join("\n");
}

export function pythonProgram() {
  const address = new URL("v1/classify", location.href);
  const header = byId("key").value ? `, "Authorization": f"Bearer {os.environ['DRBERT_API_KEY']}"` : "";
  return [
    `import json${header ? ", os" : ""}, urllib.request`,
    "",
    `for request in ${pythonValue(requests())}:`,
    "    sent = urllib.request.Request(",
    `        ${JSON.stringify(String(address))},`,
    "        json.dumps(request).encode(),",
    `        {"Content-Type": "application/json"${header}},`,
    "    )",
    "    with urllib.request.urlopen(sent) as answer:",
    "        print(json.load(answer)[\"data\"])",
  ].join("\n");
}

// JSON is Python, except for these three words; none of them can be in a request outside a string.
const pythonValue = value => JSON.stringify(value);

function requests() {
  const input = byId("text").value;
  const cut = shownLabels() ? {top_k: shownLabels()} : {};
  return chosenModels().map(model => ({model, input, ...cut, ...chosenFields()}));
}

// The text is in the fragment, which browsers send to nobody: it appears in no proxy's log.
export function link() {
  const address = new URL(location.href);
  address.search = "";
  address.hash = new URLSearchParams({text: byId("text").value});
  return String(address);
}
