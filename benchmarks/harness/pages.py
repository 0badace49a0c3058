"""
Tables and plots as they are committed: with the command, the date and the machine that made them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from html import escape
from pathlib import Path

from proof.measuring.run import processor_name

Rate = tuple[str, float, tuple[float, float]]
"""(name, rate, interval)"""


def write(
    path: Path, benchmark: str, arguments: Sequence[str], text: str, plot: str | None = None
) -> None:
    """Writes a benchmark's Markdown page, and its plot beside it."""
    command = " ".join(("python -m benchmarks", benchmark, *arguments))
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "scipy", "openvino")
    )
    picture = ""
    if plot is not None:
        path.with_suffix(".svg").write_text(plot)
        picture = f"\n![The same as a plot]({path.with_suffix('.svg').name})\n"
    path.write_text(
        f"{text}\n{picture}\nMade by `{command}` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d};"
        f" {os.cpu_count()} processors ({processor_name()}), Python {platform.python_version()},"
        f" {versions}.\n"
    )


def rate_plot(rates: Sequence[Rate], limit: float) -> str:
    """Rates with their intervals, one a row, and the limit they are held against; a stand-alone
    SVG.
    """
    left, width, row = 330, 820, 17
    highest = max([limit * 1.25, *(interval[1] for _, _, interval in rates)])
    bottom = 12 + row * len(rates)

    def x(rate: float) -> float:
        return left + (width - left - 20) * rate / highest

    shapes = [
        (
            f'<line x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="6" y2="{bottom}" stroke="#b3400e"'
            ' stroke-dasharray="4 3"/>'
        ),
        (
            f'<text x="{x(limit):.1f}" y="{bottom + 32}" text-anchor="middle" fill="#b3400e">limit'
            f" {limit:.0%}</text>"
        ),
    ]
    for i, (name, rate, (low, high)) in enumerate(rates):
        y = 12 + row * i + row / 2
        shapes += [
            f'<text x="0" y="{y + 4:.1f}">{escape(name)}</text>',
            (
                f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
                ' stroke="#1f5f9e" stroke-width="2"/>'
            ),
            f'<circle cx="{x(rate):.1f}" cy="{y:.1f}" r="3.5" fill="#1f5f9e"/>',
        ]
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if highest / s <= 8)
    for k in range(int(highest / step) + 1):
        shapes.append(
            f'<text x="{x(k * step):.1f}" y="{bottom + 16}" text-anchor="middle"'
            f' fill="#5c6470">{k * step:.0%}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 40}"'
        f' font-family="system-ui, sans-serif" font-size="12" fill="#1c1e21"><rect width="{width}"'
        f' height="{bottom + 40}" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )
