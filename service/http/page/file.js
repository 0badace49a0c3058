// The results for a file: a table, with the column of the texts to choose and a download.

import {bestLabel, haveSameLabels} from "./answers.js";
import {byId, create, showMessage} from "./dom.js";
import {chosenFields, chosenModels, drawModels} from "./options.js";
import {readFile, toCsv} from "./rows.js";
import {classify, loadModels, models, reasonWithoutModels} from "./service.js";

const BATCH_TEXTS = 32;  // texts in one request
const MAX_TEXTS = 2000;  // texts of a file

const section = byId("table");
let latest = 0;          // number of the latest file or column; older ones draw nothing
let classifyAgain = null;

export function clearTable() {
  latest++;
  classifyAgain = null;
  section.hidden = true;
}

// Classifies the file that is shown once more, as the options say now; false if none is shown.
export function refreshTable() {
  if (classifyAgain === null) return false;
  classifyAgain();
  return true;
}

export async function classifyFile(file) {
  const content = await file.text();
  const table = readFile(file.name, content);
  const name = file.name.replace(/\.[^.]*$/, "");
  const results = create("div", {className: "scroll"});
  const download = create("button", {type: "button", textContent: "Download as CSV", disabled: true});
  const controls = create("p", {className: "buttons"}, ...columnControls(table, again), download);
  const warning = content.includes("\uFFFD") ? "Some characters are not UTF-8 and cannot be read." : "";
  section.replaceChildren(create("p", {className: "truncated", textContent: warning}), controls, results);
  section.hidden = false;
  classifyAgain = again;
  await again();

  async function again() {
    const rows = await classifyColumn(table, results);
    download.disabled = rows === null;
    download.onclick = () => save(`${name}-classified.csv`, toCsv(rows));
  }
}

function columnControls(table, again) {
  if (!table.isTable) return [];
  const select = create("select", {id: "column"});
  const drawTitles = () => {
    const titles = (table.rows[0] ?? []).map((cell, i) => table.hasHeader ? cell : `column ${i + 1}: ${cell.slice(0, 30)}`);
    select.replaceChildren(...titles.map((title, i) => create("option", {value: i, textContent: title, selected: i === table.column})));
  };
  drawTitles();
  select.addEventListener("change", () => { table.column = Number(select.value); again(); });
  const box = create("input", {type: "checkbox", id: "header", checked: table.hasHeader});
  box.addEventListener("change", () => { table.hasHeader = box.checked; drawTitles(); again(); });
  return [
    create("label", {htmlFor: "column", textContent: "Texts are in "}), select,
    create("label", {}, box, " the first row is a header"),
  ];
}

// Classifies one column with every chosen model. Returns the file's rows with the answers behind
// them, for a download, or null.
async function classifyColumn({rows, hasHeader, column}, results) {
  const turn = ++latest;
  if (!models.length) await loadModels() && drawModels();
  const chosen = chosenModels(), fields = chosenFields();
  const reason = reasonWithoutModels(chosen);
  const filled = rows.slice(hasHeader ? 1 : 0).filter(row => (row[column] ?? "").trim());
  const taken = filled.slice(0, MAX_TEXTS);
  if (reason || !taken.length) {
    results.replaceChildren();
    showMessage(reason || "There is no text in it.", true);
    return null;
  }
  const body = create("tbody");
  const titles = ["text", ...chosen].map(textContent => create("th", {scope: "col", textContent}));
  results.replaceChildren(create("table", {}, create("thead", {}, create("tr", {}, ...titles)), body));
  const width = Math.max(...rows.map(row => row.length));
  const names = hasHeader ? rows[0] : width > 1 ? Array.from({length: width}, (_, i) => `column ${i + 1}`) : ["text"];
  const saved = [[...padded(names, width), ...chosen.flatMap(model => [`${model} label`, `${model} score`])]];
  let differing = 0;
  try {
    for (let start = 0; start < taken.length; start += BATCH_TEXTS) {
      const batch = taken.slice(start, start + BATCH_TEXTS);
      const input = batch.map(row => row[column].trim());
      const byModel = [];
      for (const model of chosen) byModel.push((await classify({model, input, ...fields})).results);
      if (turn !== latest) return null;
      batch.forEach((row, i) => {
        const answers = byModel.map(answered => answered[i]);
        const differs = haveSameLabels(answers) && answers.some(each => each.label !== answers[0].label);
        differing += differs;
        body.append(resultRow(input[i], answers, differs));
        saved.push([...padded(row, width), ...answers.flatMap(answer => [bestLabel(answer), answer.score])]);
      });
      showMessage(progress(Math.min(start + BATCH_TEXTS, taken.length), taken.length, differing, chosen.length));
    }
  } catch (error) {
    if (turn === latest) showMessage(error.message, true);
    return saved.length > 1 ? saved : null;
  }
  if (filled.length > MAX_TEXTS) showMessage(`the first ${MAX_TEXTS} texts of ${filled.length}`);
  return saved;
}

const padded = (row, width) => Array.from({length: width}, (_, i) => row[i] ?? "");

function progress(done, all, differing, models) {
  const differ = models > 1 && differing ? `, ${differing} get different labels` : "";
  return `${done} of ${all} texts${differ}`;
}

function resultRow(text, answers, differs) {
  const cells = answers.map(({label, score, truncated}) => {
    const textContent = `${label} ${score.toFixed(4)}${truncated ? " (truncated)" : ""}`;
    return create("td", {textContent});
  });
  return create("tr", {className: differs ? "differ" : ""}, create("td", {textContent: text}), ...cells);
}

function save(name, content) {
  const address = URL.createObjectURL(new Blob([content], {type: "text/csv"}));
  create("a", {href: address, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
