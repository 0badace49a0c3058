// Classifies typed texts or a file with every chosen model, and draws the results and the load.
// The page loads nothing from another host, and there is no build step.

import {bestLabel, clearAnswers, drawAnswers, haveSameLabels} from "./answers.js";
import {byId, create, showMessage} from "./dom.js";
import {classifyFile, clearTable, refreshTable} from "./file.js";
import {refreshLive} from "./live.js";
import {chosenFields, chosenModels, curlCommands, drawModels, link, pythonProgram} from "./options.js";
import {classify, isLocked, loadModels, models, reasonWithoutModels} from "./service.js";

const TYPING_PAUSE_MS = 400;  // time after the last key until a text is sent by itself
const REFRESH_MS = 5000;      // time between two reads of /metrics
const EXAMPLES = [
  "a charming and often affecting journey",
  "the plot is as thin as its jokes are old",
  "I waited three weeks, and the parcel never came.",
];

const form = byId("form"), text = byId("text");
let latestTurn = 0;           // number of the latest classification; older ones draw nothing
let typingTimer = 0;

async function refreshModels() {
  if (await loadModels()) drawModels();
}

async function classifyText({isSubmitted = false} = {}) {
  clearTimeout(typingTimer);
  const input = text.value, turn = ++latestTurn;
  clearTable();
  if (!input.trim()) {
    clearAnswers();
    showMessage(isSubmitted ? "Type a text first." : "");
    return;
  }
  showMessage("…");
  try {
    if (!models.length) await refreshModels();  // the text may come before the first answer of /info
    const names = chosenModels();
    const reason = reasonWithoutModels(names);
    if (reason) throw new Error(reason);
    const answered = [];
    for (const model of names) {  // in turn: otherwise the second one's time includes the first's
      const {results, timing, elapsedMs} = await classify({model, input, ...chosenFields()});
      if (turn !== latestTurn) return;  // a later text is under way
      answered.push({model, result: results[0], timing, elapsedMs});
    }
    const comparable = haveSameLabels(answered.map(({result}) => result));
    for (const answer of answered) {
      answer.differs = comparable && bestLabel(answer.result) !== bestLabel(answered[0].result);
    }
    drawAnswers(answered);
    showMessage("");
  } catch (error) {
    if (turn !== latestTurn) return;
    clearAnswers();
    showMessage(error.message, true);
  }
}

async function copy(make, what) {
  const reason = text.value.trim() ? reasonWithoutModels(chosenModels()) : "Type a text first.";
  if (reason) {
    showMessage(reason);
    return;
  }
  const copied = make();
  try {
    await navigator.clipboard.writeText(copied);
    showMessage(`${what} copied`);
  } catch {
    showMessage(copied);  // without HTTPS, browsers do not let a page write to the clipboard
  }
}

function take(file) {
  latestTurn++;
  clearAnswers();
  classifyFile(file).catch(error => showMessage(`The file cannot be read: ${error.message}`, true));
}

function classifyAgain() {
  if (!refreshTable()) classifyText();
}

byId("examples").append(...EXAMPLES.map(example => {
  const chip = create("button", {type: "button", className: "chip", textContent: example});
  chip.addEventListener("click", () => { text.value = example; classifyText(); });
  return chip;
}));
if (/Mac|iPhone|iPad/.test(navigator.userAgent)) byId("modifier").textContent = "⌘";

form.addEventListener("submit", event => {
  event.preventDefault();
  classifyText({isSubmitted: true});
});
text.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    classifyText({isSubmitted: true});
  }
});
text.addEventListener("input", () => {
  clearTimeout(typingTimer);
  if (isLocked) return;  // until there is another key, every text would be refused
  typingTimer = setTimeout(classifyText, TYPING_PAUSE_MS);
});
byId("key").addEventListener("change", async () => {
  await refreshModels();
  classifyAgain();
});
byId("key").addEventListener("keydown", event => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  refreshModels().then(() => refreshTable() || classifyText({isSubmitted: true}));
});
byId("options").addEventListener("change", classifyAgain);
byId("curl").addEventListener("click", () => copy(curlCommands, "curl command"));
byId("python").addEventListener("click", () => copy(pythonProgram, "Python program"));
byId("share").addEventListener("click", () => copy(link, "link"));
byId("pick").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", event => {
  if (event.target.files[0]) take(event.target.files[0]);
  event.target.value = "";  // so that the same file can be chosen again
});
for (const [type, isOver] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(type, event => {
    event.preventDefault();
    text.classList.toggle("drop", isOver);
  });
}
document.addEventListener("drop", event => {
  const [file] = event.dataTransfer.files;
  if (file) {
    take(file);
    return;
  }
  text.value = event.dataTransfer.getData("text");
  classifyText();
});

await refreshModels();
refreshLive();
setInterval(refreshLive, REFRESH_MS);
setInterval(refreshModels, 6 * REFRESH_MS);
const linked = new URLSearchParams(location.hash.slice(1)).get("text")
  ?? new URLSearchParams(location.search).get("text");
if (linked !== null) {
  text.value = linked;
  classifyText();
}
