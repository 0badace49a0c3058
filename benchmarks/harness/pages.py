"""
Markdown pages with the results of a benchmark: the one place that writes and plots them.

Each page states the command, the date, the machine and the packages that produced it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from proof.measuring.run import processor_model, processor_name
from service.host import cpus

PACKAGES = (
    "openvino",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
    "nncf",
    "uvicorn",
    "fastapi",
    "tokenizers",
)

Rate = tuple[str, float, tuple[float, float]]
"""Name, rate and its interval, both as fractions of one."""


def write(
    path: Path,
    title: str,
    command: str,
    text: str,
    plot: str | None = None,
    packages: Sequence[str] = PACKAGES,
) -> dict[str, Any]:
    """Write a Markdown page and return the environment that it names.

    `text` is the page below its title and origin. `plot` is an SVG, which goes into a file next to
    the page. `packages` are those whose versions matter to the result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = environment(packages)
    sections = [f"# {title}", _origin(command, machine), text.strip("\n")]
    if plot is not None:
        picture = path.with_suffix(".svg")
        picture.write_text(plot)
        sections.append(f"![The same as a plot]({picture.name})")
    path.write_text("\n\n".join(sections) + "\n")
    return machine


def _origin(command: str, machine: dict[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in machine["packages"].items()]
    precisions = ", ".join(machine["native_precisions"])
    processor = f"{machine['processor']}, {machine['processor_model']}"
    parts = [
        f"{machine['processors']} processors ({processor})",
        f"native precisions {precisions}",
        f"Python {machine['python']}",
        *versions,
    ]
    return f"Made by `{command}` on {machine['date']}: {', '.join(parts)}."


def environment(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return the date and what a time depends on here: processor, system and package versions."""
    return {
        "date": now(),
        "processor": processor_name(),
        "processor_model": processor_model(),
        "processors": os.cpu_count(),
        "usable": cpus.usable(),
        "native_precisions": sorted(cpus.native_precisions()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": installed(packages),
    }


def now() -> str:
    """Return the date and time in UTC, to the minute."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed.

    A machine with a GPU has other packages than one that exports.
    """
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def rate_plot(rates: Sequence[Rate], limit: float) -> str:
    """Return a stand-alone SVG with a row for each rate, its interval, and the limit as a line.

    The forest plot of proof/reports does not fit: it draws ratios on a log scale, and a rate may
    be 0.
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
