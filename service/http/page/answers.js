// The answers for one text: a card for each model.

import {byId, create} from "./dom.js";
import {shownLabels} from "./options.js";

const SHOWN_LABELS = 5;  // labels drawn before the button for all of them

export function drawAnswers(answers) {
  byId("answers").replaceChildren(...answers.map(card));
  // Once for each answer; the cards themselves would be read out in full after every pause.
  const said = answers.map(({model, result}) => `${model}: ${bestLabel(result)}${share(result)}`);
  byId("announcement").textContent = said.join("; ");
}

export function clearAnswers() {
  byId("answers").replaceChildren();
  byId("announcement").textContent = "";
}

function card({model, result, timing, elapsedMs, differs}) {
  const all = result.scores;
  const few = shownLabels() ?? SHOWN_LABELS;
  const list = create("ul", {className: "labels"});
  const draw = count => list.replaceChildren(...all.slice(0, count).map(score => row(score, result)));
  draw(few);
  const buttons = all.length > few ? [toggle(all.length, few, draw)] : [];
  const facts = create("p", {className: "facts"}, `${result.tokens} tokens`);
  if (result.truncated) {
    const textContent = "truncated to the model's length";
    facts.append(" · ", create("span", {className: "truncated", textContent}));
  }
  const heading = create("h2", {},
    create("span", {textContent: model}), " ",
    create("span", {className: "answer", textContent: bestLabel(result)}));
  if (differs) facts.append(" · ", create("span", {className: "truncated", textContent: "differs from the first model"}));
  const article = create("article", {className: "card"},
    heading, list, ...buttons, facts, ...stages(timing, elapsedMs));
  article.setAttribute("aria-label", `${model}: ${bestLabel(result)}`);
  return article;
}

function toggle(count, few, draw) {
  let isOpen = false;
  const button = create("button", {type: "button"});
  const show = () => {
    button.textContent = isOpen ? "fewer labels" : `all ${count} labels`;
    button.ariaExpanded = isOpen;
    draw(isOpen ? count : few);
  };
  button.addEventListener("click", () => { isOpen = !isOpen; show(); });
  show();
  return button;
}

// Models with other labels differ on every text, which says nothing.
export function haveSameLabels(results) {
  const labels = results.map(({scores}) => scores.map(({label}) => label).sort().join("\n"));
  return labels.every(each => each === labels[0]);
}

export function bestLabel(result) {
  if (result.labels) return result.labels.join(", ") || "none";
  return result.num_classes > 1 ? result.label : result.score.toPrecision(4);
}

function share(result) {
  return result.num_classes > 1 && !result.labels ? ` ${(100 * result.score).toFixed(0)} %` : "";
}

function row({label, score}, result) {
  const isNumber = result.num_classes <= 1;
  const width = isNumber ? 0 : Math.max(0, Math.min(1, score));
  const bar = create("div", {className: "bar"});
  bar.style.width = `${100 * width}%`;
  const shown = isNumber ? score.toPrecision(5) : `${(100 * score).toFixed(2)} %`;
  // Several labels of a multi-label model may apply.
  const counts = result.labels ? result.labels.includes(label) : label === result.label;
  const track = create("div", {className: "track"}, bar);
  track.ariaHidden = true;
  return create("li", {className: counts ? "label best" : "label"},
    create("span", {textContent: label}), track, create("span", {textContent: shown}));
}

function stages(timing, elapsedMs) {
  const {tokenize = 0, queue = 0, inference = 0, total = 0} = timing;
  const other = Math.max(0, total - tokenize - queue - inference);
  const bar = create("div", {className: "stages"});
  bar.ariaHidden = true;
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
