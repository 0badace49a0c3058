// Requests per second and latencies of each model over the last minutes, as lines.
//
// They come from the differences between two reads of the histograms in /metrics.

import {byId, create, createSvg} from "./dom.js";
import {call, counted} from "./service.js";

const KEPT = 60;  // differences that are drawn: five minutes
const WIDTH = 120, HEIGHT = 24;

const BUCKET = new RegExp(
  String.raw`^drbert_request_duration_seconds_bucket\{(?=[^}]*model="((?:[^"\\]|\\.)*)")`
  + String.raw`(?=[^}]*le="([^"]+)")[^}]*\} (\S+)$`, "gm");

let before = null;     // the last read: its time, and buckets by model
const points = {};     // by model: {rate, p50, p95} between two reads; null without requests

export async function refreshLive() {
  let response;
  try {
    response = await call("metrics");
  } catch {
    // Nothing is known any more, so nothing old is shown.
    before = null;
    for (const name of Object.keys(points)) delete points[name];
    draw();
    return;
  }
  if (!response.ok) {
    byId("live").hidden = true;
    return;
  }
  byId("live").hidden = false;
  const instance = response.headers.get("x-instance-id");
  const latest = {time: Date.now(), instance, models: parseBuckets(await response.text())};
  if (before?.instance === instance) for (const name of counted) add(name, latest);
  before = latest;
  draw();
}

function parseBuckets(page) {
  const byModel = {};
  for (const [, model, bound, count] of page.matchAll(BUCKET)) {
    const upper = bound === "+Inf" ? Infinity : Number(bound);
    (byModel[model] ??= []).push([upper, Number(count)]);
  }
  return byModel;
}

function add(name, latest) {
  const buckets = latest.models[name];
  if (!buckets) return;
  const old = before.models[name];
  const counts = buckets.map(([bound, count], i) => [bound, count - (old?.[i]?.[1] ?? 0)]);
  // Another replica answered, or this one began anew: nothing is known of the time between.
  if (counts.some(([, count]) => count < 0)) return;
  const requests = counts.at(-1)[1];
  const seconds = (latest.time - before.time) / 1000;
  const point = {rate: requests / seconds, p50: quantile(counts, 0.5), p95: quantile(counts, 0.95)};
  points[name] = [...(points[name] ?? []), point].slice(-KEPT);
}

// Milliseconds; null without requests.
function quantile(counts, q) {
  const rank = q * counts.at(-1)[1];
  if (rank <= 0) return null;
  let low = 0, below = 0;
  for (const [bound, count] of counts) {
    if (count >= rank) {
      if (bound === Infinity) return 1000 * low;
      return 1000 * (low + (bound - low) * (rank - below) / Math.max(1, count - below));
    }
    [low, below] = [bound, count];
  }
  return null;
}

function draw() {
  const rows = counted.map(name => {
    const series = points[name] ?? [];
    return create("tr", {},
      create("th", {scope: "row", textContent: name}),
      cell(series.map(point => point.rate), "", `requests per second of ${name}`),
      cell(series.map(point => point.p50), " ms", `p50 of ${name}`),
      cell(series.map(point => point.p95), " ms", `p95 of ${name}`));
  });
  byId("live").querySelector("tbody").replaceChildren(...rows);
}

function cell(values, unit, name) {
  const known = values.filter(value => value !== null);
  if (!known.length) return create("td", {textContent: "–"});
  const shown = `${rounded(known.at(-1))}${unit}`;
  return create("td", {}, sparkline(values, Math.max(...known), `${name}, last ${shown}`), ` ${shown}`);
}

// Buckets are 20 % wide, so two digits are all there is to know.
function rounded(value) {
  return String(Number(value.toPrecision(2)));
}

function sparkline(values, most, label) {
  const x = i => (WIDTH - 2) * (KEPT - values.length + i) / (KEPT - 1) + 1;
  const y = value => HEIGHT - 2 - (HEIGHT - 4) * (most > 0 ? value / most : 0);
  const lines = [];
  let line = [];
  values.forEach((value, i) => {
    if (value === null) { lines.push(line); line = []; } else line.push(`${x(i).toFixed(1)},${y(value).toFixed(1)}`);
  });
  lines.push(line);
  const shapes = lines.filter(each => each.length).map(each => each.length > 1
    ? createSvg("polyline", {points: each.join(" ")})
    : createSvg("circle", {cx: each[0].split(",")[0], cy: each[0].split(",")[1], r: 1.2}));
  return createSvg("svg", {class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label}, ...shapes);
}
