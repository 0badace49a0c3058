"""
The README's chart: texts per second of every server, as measured by `python -m benchmarks all`.

    python -m benchmarks.peers.chart

It is a picture of benchmarks/RESULTS.json. Its colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

RESULTS = Path("benchmarks/RESULTS.json")
CHART = Path("docs/peers.svg")
SIZE = "base"
RATE_COLUMN = "texts/s, 32 connections"
OURS = "DrBERT Serve"
WIDTH, ROW, BAR, TOP = 760, 26, 16, 44
LABELS, VALUES = 262, 60
"""Pixels left of the bars for names, and right of them for values."""
STYLE = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
.title { font-weight: 600; font-size: 14px; } .ours { font-weight: 600; }
.bar { fill: #b6bec9; } .bar.ours { fill: #1a6fd4; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .bar { fill: #586270; } .bar.ours { fill: #58a6ff; }
}"""


def read_rates(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the servers with their texts per second, the fastest first."""
    [finding] = [each for each in results["findings"] if each["name"] == f"peers {SIZE}"]
    table = finding["tables"][0]
    column = table["columns"].index(RATE_COLUMN)
    rates = [(row[0], float(row[column].replace(",", ""))) for row in table["rows"]]
    return sorted(rates, key=lambda rate: -rate[1])


def draw(rates: Sequence[tuple[str, float]]) -> str:
    """Return an SVG with a bar for each server."""
    height = TOP + ROW * len(rates) + 6
    summary = "; ".join(f"{name} {rate:g}" for name, rate in rates)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" role="img" aria-labelledby="title">',
        f'<title id="title">Texts per second: {escape(summary)}</title>',
        f"<style>{STYLE}</style>",
        '<text class="title" x="0" y="18">Texts per second, BERT-base, one processor, 32'
        " connections (more is better)</text>",
        *_bars(rates),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _bars(rates: Sequence[tuple[str, float]]) -> Iterator[str]:
    most = max(rate for _, rate in rates)
    for number, (name, rate) in enumerate(rates):
        y = TOP + ROW * number
        ours = " ours" if name.startswith(OURS) else ""
        width = (WIDTH - LABELS - VALUES) * rate / most
        yield (
            f'<text class="name{ours}" x="{LABELS - 8}" y="{y + 12}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
        yield (
            f'<rect class="bar{ours}" x="{LABELS}" y="{y}" width="{width:.1f}" height="{BAR}"'
            ' rx="2"/>'
        )
        yield f'<text class="value{ours}" x="{LABELS + width + 6:.1f}" y="{y + 12}">{rate:g}</text>'


def main() -> None:
    """Write the chart."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    CHART.write_text(draw(read_rates(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
