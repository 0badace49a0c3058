"""
Writes report.html: one file, no network, the verdict first and everything it rests on below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from proof.evidence import read_requests, read_starts
from proof.judge import read_sealed_plan, reading
from proof.plan import Plan, Role

STYLE = """
:root { --ink: #1c1e21; --soft: #5c6470; --line: #d5d9df; --paper: #fff; --band: #e8f1fa; --dot: #1f5f9e; --bad: #b3400e; --good: #1d6b4f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a0a8b3; --line: #3b414a; --paper: #16181c; --band: #1d2c3c; --dot: #7db8f0; --bad: #f0915f; --good: #6fcba6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } code { font-size: .9em; overflow-wrap: anywhere; }
.verdict { border-left: .4rem solid var(--soft); padding: .2rem 0 .2rem 1rem; } .good { border-color: var(--good); } .bad { border-color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; } th { font-weight: 600; color: var(--soft); }
td.n, th.n { text-align: right; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
@media print { body { max-width: none; } h2 { break-after: avoid; } svg, table { break-inside: avoid; } }
"""

LIMITS = """This compares two models on one machine, at one load level, with these texts. It says nothing of other hardware,
other lengths, other load, or the quality of the answers. Interleaved latencies run on colder caches than a service of one
model would: compare them, do not quote them. Digests stop accidents and later edits, not an author who rewrites everything."""


def write(folder: Path, verdict: dict[str, Any], path: Path | None = None) -> Path:
    """Renders the report of a run into `path` (default: report.html in its folder)."""
    plan = read_sealed_plan(folder)
    path = path or folder / "report.html"
    level = verdict["levels"][plan.level.name]
    environment = _read_json(folder / "environment.json")
    good = verdict["verdict"] in ("equivalent", "not-slower")
    tone = "good" if good else "bad" if verdict["verdict"] in ("not-equivalent", "invalid") else ""
    body = f"""
<div class="verdict {tone}"><p class="soft">{escape(plan.name)}: is the candidate as fast as the reference?</p>
<h1>{escape(verdict["verdict"].replace("-", " ").capitalize())}</h1><p>{escape(verdict["sentence"])}</p></div>
<p>{_reading(plan, level)}</p>
<h2>Difference from the reference</h2>
<p class="soft">Line: 90 % interval of the ratio. Dot: estimate. Shaded: the margin claimed before the run. Not slower means the line ends before the right edge of the shade; equivalent means it lies inside.</p>
{_forest(level)}
<div class="scroll">{_statistics_table(level, plan.claim)}</div>
<h2>Every restart</h2>
<p class="soft">Candidate over reference, one dot a start of the server. The interval above is Student's t over these dots, adjusted for load order.</p>
{_dots(level)}
<h2>Where a request's time goes</h2>
{_phases(folder, plan)}
<h2>Same work?</h2>
{_identity(folder)}
<h2>Gates</h2>
<p class="soft">What must hold for the measurement to count; none looks at the difference itself.</p>
<div class="scroll">{_table(("", "gate", "found"), [("ok" if g["passed"] else "FAILED", g["name"], g["found"]) for g in level["gates"]])}</div>
<h2>Starts of the server</h2>
<div class="scroll">{_starts(folder)}</div>
<h2>Where it ran</h2>
<div class="scroll">{_environment(environment)}</div>
<h2>What this does not prove</h2><p>{LIMITS}</p>
<p class="soft">Judge it again from this folder: <code>python -m proof judge {escape(folder.name)}</code>. Run {verdict["run"]["number_for_this_plan"]} of plan <code>{plan.digest}</code>.</p>
"""
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(plan.name)}: {escape(verdict['verdict'])}</title><style>{STYLE}</style></head><body>{body}</body></html>\n",
        encoding="utf-8",
    )
    return path


def _reading(plan: Plan, level: dict[str, Any]) -> str:
    requests = level["restarts_kept"] * level["tuples"] * 4
    return (
        f"{level['restarts_kept']} starts of the server counted ({level['restarts_dropped']} dropped); in each, {level['tuples']} texts were sent "
        f"once to each of four loaded copies, one request at a time: {requests:,} requests. Not slower: <b>{_yes(level['readings']['not_slower'])}</b>. "
        f"Equivalent: <b>{_yes(level['readings']['equivalent'])}</b>. Claimed: {escape(plan.claim)}."
    )


def _forest(level: dict[str, Any]) -> str:
    """Intervals and margins, one row a claimed statistic, and the control's below, each group on its own scale."""
    pictures = [_intervals(level["statistics"], 3.0)]
    if level["control"]:
        pictures.append('<p class="soft">The control, with its decoder kept; it must be told apart:</p>' + _intervals(level["control"], 1.3))
    return "".join(pictures)


def _intervals(items: Sequence[dict[str, Any]], widest_margins: float) -> str:
    if not items:
        return "<p>Too few restarts for an interval.</p>"
    width, left, right, row, top = 720, 170, 20, 30, 8
    reach = max([widest_margins / 2 * math.log1p(i["margin"]) for i in items] + [1.08 * abs(math.log(x)) for i in items for x in i["interval"]])
    x = _Scale(reach, left, width - right)
    shapes = []
    for n, item in enumerate(items):
        y = top + row * n + row / 2
        low, high = item["interval"]
        a, b = x(1 / (1 + item["margin"])), x(1 + item["margin"])
        outside = item.get("outside") or item.get("not_equivalent")
        colour = "var(--bad)" if outside else "var(--dot)"
        label = f'{_words(item["metric"])} {item["statistic"]}'
        shapes.append(
            f'<rect x="{a:.1f}" y="{y - 11:.1f}" width="{b - a:.1f}" height="22" fill="var(--band)"/>'
            f'<text x="0" y="{y + 4:.1f}">{label}</text>'
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="3"/>'
            f'<circle cx="{x(item["ratio"]):.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
        )
    bottom = top + row * len(items)
    ticks = _ticks(reach)
    axis = f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{top}" y2="{bottom}" stroke="var(--soft)" stroke-dasharray="3 3"/>' + "".join(
        f'<text class="soft" x="{x(1 + t):.1f}" y="{bottom + 18}" text-anchor="middle">{t:+.{0 if abs(t) >= 0.01 or t == 0 else 1}%}</text>' for t in ticks
    )
    return f'<svg viewBox="0 0 {width} {bottom + 26}" role="img" aria-label="intervals">{"".join(shapes)}{axis}</svg>'


@dataclass(frozen=True)
class _Scale:
    """Ratios to horizontal places, on a log scale with 1 in the middle."""

    reach: float
    left: float
    right: float

    def __call__(self, ratio: float) -> float:
        return self.left + (math.log(ratio) / self.reach + 1) / 2 * (self.right - self.left)


def _ticks(reach: float) -> list[float]:
    step = next((s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if math.expm1(reach) / s <= 4), 2.0)
    count = int(min(math.expm1(reach), 50) / step)
    lowest = -int(-math.expm1(-reach) / step)
    return [k * step for k in range(lowest, count + 1)]


def _dots(level: dict[str, Any]) -> str:
    items = level["statistics"]
    if not items:
        return ""
    width, left, right, row, top = 720, 170, 20, 26, 8
    reach = max(1.08 * abs(math.log(r)) for i in items for r in i["restart_ratios"])
    x = _Scale(reach, left, width - right)
    shapes = []
    for n, item in enumerate(items):
        y = top + row * n + row / 2
        shapes.append(f'<text x="0" y="{y + 4:.1f}">{_words(item["metric"])} {item["statistic"]}</text>')
        shapes += [f'<circle cx="{x(r):.1f}" cy="{y:.1f}" r="4.5" fill="var(--dot)" fill-opacity=".55"/>' for r in item["restart_ratios"]]
    bottom = top + row * len(items)
    labels = "".join(
        f'<text class="soft" x="{x(1 + t):.1f}" y="{bottom + 18}" text-anchor="middle">{t:+.{0 if abs(t) >= 0.01 or t == 0 else 1}%}</text>' for t in _ticks(reach)
    )
    zero = f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{top}" y2="{bottom}" stroke="var(--soft)" stroke-dasharray="3 3"/>'
    return f'<svg viewBox="0 0 {width} {bottom + 26}" role="img" aria-label="ratios of every restart">{zero}{"".join(shapes)}{labels}</svg>'


def _statistics_table(level: dict[str, Any], claim: str) -> str:
    rows = [
        (
            _words(i["metric"]), i["statistic"], f"{i['reference_us'] / 1000:.3f} ms", f"{i['ratio'] - 1:+.2%}",
            f"{i['interval'][0] - 1:+.2%} … {i['interval'][1] - 1:+.2%}", f"±{100 * i['margin']:g} %",
            reading(i, claim),
        )
        for i in level["statistics"]
    ]
    control = [
        (f"control: {_words(i['metric'])}", i["statistic"], "", f"{i['ratio'] - 1:+.2%}",
         f"{i['interval'][0] - 1:+.2%} … {i['interval'][1] - 1:+.2%}", f"±{100 * i['margin']:g} %",
         "not equivalent" if i["not_equivalent"] else "undecided")
        for i in level["control"]
    ]
    return _table(("time", "statistic", "reference", "difference", "90 % interval", "margin", "reading"), rows + control, numbers={2, 3, 4, 5})


def _phases(folder: Path, plan: Plan) -> str:
    """Mean milliseconds a phase, by role, over the requests of the claim."""
    table = read_requests(folder)
    dropped = [start.restart for start in read_starts(folder) if start.dropped]
    column = {n: table[n].to_numpy(zero_copy_only=False) for n in ("slice", "restart", "arm", "sent_ns", "done_ns", "tokenize_us", "queue_us", "inference_us")}
    counted = ~np.isin(column["restart"], dropped)
    rows = []
    blocks: dict[Role, int] = {"reference": 0, "candidate": 0, "control": 1}
    for role, block in blocks.items():
        names = [plan.arms[i].name for i in plan.indices(role)]
        chosen = counted & (column["slice"] == block) & np.isin(column["arm"], names)
        if not chosen.any():
            continue
        phases = [float(column[p][chosen].mean()) / 1000 for p in ("tokenize_us", "queue_us", "inference_us")]
        total = float((column["done_ns"] - column["sent_ns"])[chosen].mean()) / 1e6
        rows.append((role, *(f"{p:.3f}" for p in phases), f"{total - sum(phases):.3f}", f"{total:.3f}"))
    return '<p class="soft">Mean milliseconds; the rest is HTTP on both sides and the way between.</p><div class="scroll">' + _table(
        ("", "tokenize", "queue", "inference", "rest", "end to end"), rows, numbers={1, 2, 3, 4, 5}
    ) + "</div>"


def _identity(folder: Path) -> str:
    compared = _read_json(folder / "identity.json")
    lines = []
    for name, result in compared.items():
        if result["same"]:
            lines.append(f"<p><b>{escape(name)}</b>: the same encoder graph (<code>{result['encoder_digest'][0][:16]}</code>), head and tokenizer as the reference.</p>")
        else:
            details = "".join(f"<li>{escape(d['what'])}: {escape(d['detail'])}</li>" for d in result["differences"])
            lines.append(f"<p><b>{escape(name)}</b> does other work than the reference:</p><ul>{details}</ul>")
    return "".join(lines)


def _starts(folder: Path) -> str:
    rows = [
        (str(s.restart), s.load_order.replace(" ", " → "), f"{s.seconds:.1f} s", f"{s.generator_cpu_share:.0%}", s.dropped or "counts")
        for s in read_starts(folder)
    ]
    return _table(("start", "load order", "took", "generator CPU", ""), rows, numbers={2, 3})


def _environment(environment: dict[str, Any]) -> str:
    server = environment.get("server", {})
    rows = [
        (key.replace("_", " "), environment[key] if isinstance(environment[key], str) else json.dumps(environment[key]))
        for key in ("processor", "processors", "system", "python", "server_cpus", "generator_cpus", "packages", "commit") if key in environment
    ]
    for name, model in server.get("models", {}).items():
        rows.append((f"model {name}", f"{model['variant']} on {model['runtime']} in {model['precision']}, artifact {model['digest'][:16]}"))
    return _table(("", ""), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def mark(i: int) -> str:
        return ' class="n"' if i in right else ""

    top = "".join(f"<th{mark(i)}>{escape(cell)}</th>" for i, cell in enumerate(head))
    body = "".join("<tr>" + "".join(f"<td{mark(i)}>{escape(cell, quote=False)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
