// The results for a file: a table, with the column of the texts to choose and a download.

import {haveSameLabels} from "./answers.js";
import {byId, create, showMessage} from "./dom.js";
import {chosenFields, chosenModels} from "./options.js";
import {readFile, toCsv} from "./rows.js";
import {classify} from "./service.js";

const BATCH_TEXTS = 32;  // texts in one request
const MAX_TEXTS = 2000;  // texts of a file

const section = byId("table");
let latest = 0;          // number of the latest file or column; older ones draw nothing

export function clearTable() {
  latest++;
  section.hidden = true;
}

export async function classifyFile(file) {
  const table = readFile(file.name, await file.text());
  const name = file.name.replace(/\.[^.]*$/, "");
  const results = create("div", {className: "scroll"});
  const download = create("button", {type: "button", textContent: "Download as CSV", disabled: true});
  const controls = create("p", {className: "buttons"}, ...columnControls(table, again), download);
  section.replaceChildren(controls, results);
  section.hidden = false;
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

// Classifies one column with every chosen model, and returns the rows for a download, or null.
async function classifyColumn({rows, hasHeader, column}, results) {
  const turn = ++latest;
  const cells = rows.slice(hasHeader ? 1 : 0).map(row => (row[column] ?? "").trim()).filter(Boolean);
  const texts = cells.slice(0, MAX_TEXTS);
  if (!texts.length) {
    results.replaceChildren();
    showMessage("There is no text in it.", true);
    return null;
  }
  const models = chosenModels(), fields = chosenFields();
  const body = create("tbody");
  const titles = ["text", ...models].map(textContent => create("th", {scope: "col", textContent}));
  results.replaceChildren(create("table", {}, create("thead", {}, create("tr", {}, ...titles)), body));
  const saved = [["text", ...models.flatMap(model => [`${model} label`, `${model} score`])]];
  let differing = 0;
  try {
    for (let start = 0; start < texts.length; start += BATCH_TEXTS) {
      const input = texts.slice(start, start + BATCH_TEXTS);
      const byModel = [];
      for (const model of models) byModel.push((await classify({model, input, ...fields})).results);
      if (turn !== latest) return null;
      input.forEach((text, i) => {
        const answers = byModel.map(answered => answered[i]);
        const differs = haveSameLabels(answers) && answers.some(each => each.label !== answers[0].label);
        differing += differs;
        body.append(resultRow(text, answers, differs));
        saved.push([text, ...answers.flatMap(({label, score}) => [label, score])]);
      });
      showMessage(progress(Math.min(start + BATCH_TEXTS, texts.length), texts.length, differing, models.length));
    }
  } catch (error) {
    if (turn === latest) showMessage(error.message, true);
    return saved.length > 1 ? saved : null;
  }
  if (cells.length > MAX_TEXTS) showMessage(`the first ${MAX_TEXTS} texts of ${cells.length}`);
  return saved;
}

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
