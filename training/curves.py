"""
Draws the losses of pretraining runs over the tokens they saw.

    drbert-curves build/training/bert-mini build/training/drbert-mini --out losses.svg
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from command import Parser, Unavailable, finish

# Okabe and Ito's palette, distinguishable for colour-blind readers.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
DASHES = ("-", "--", "-.", ":")
SMOOTHED_OVER = 0.02
"""Length of the moving average of the training loss, as a share of the run."""
SHOWN_FROM = 0.1
"""Share of a run after which its losses set the axis' range: the fall of the first steps would hide
where runs differ.
"""


def draw(panels: Mapping[str, Mapping[str, Sequence[Path]]], out: Path) -> None:
    """Draw an SVG with a panel for each kind of loss.

    A panel has a colour for each name and a line for each of its runs. Training loss is a line,
    held-out loss points. A grey line marks the loss of a finished run without context.
    """
    mpl.rcParams["svg.hashsalt"] = "losses"  # the same numbers give the same file
    figure = Figure(figsize=(6.5 * len(panels), 4.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, runs) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, title, runs)
    figure.savefig(out, format="svg", metadata={"Date": None})


def _draw_panel(axes: Axes, title: str, runs: Mapping[str, Sequence[Path]]) -> None:
    shown: list[float] = []
    levels: dict[float, list[str]] = {}
    for name, label, colour, dash, folder in line_styles(runs):
        tokens, loss, held_out = read_log(folder / "log.csv")
        window = max(1, round(SMOOTHED_OVER * len(loss)))
        smooth = np.convolve(loss, np.ones(window) / window, "valid")
        axes.plot(tokens[window - 1 :] / 1e6, smooth, dash, color=colour, linewidth=1, label=label)
        measured = ~np.isnan(held_out)
        axes.plot(tokens[measured] / 1e6, held_out[measured], "o", color=colour, markersize=3)
        shown += [*smooth[round(SHOWN_FROM * len(smooth)) :], *held_out[measured]]
        level = loss_without_context(folder)
        if level is not None:
            names = levels.setdefault(round(level, 2), [])
            if name not in names:
                names.append(name)
    for level, names in sorted(levels.items()):
        _draw_level(axes, level, names if len(names) < len(runs) / 2 else [])
    shown += levels
    margin = 0.05 * (max(shown) - min(shown)) or 1.0
    axes.set(
        title=title,
        xlabel="tokens (millions)",
        ylabel="loss (nats); points: held out",
        ylim=(min(shown) - margin, max(shown) + margin),
    )
    axes.legend(frameon=False, loc="lower left")  # where falling curves leave space
    axes.spines[["top", "right"]].set_visible(False)


def _draw_level(axes: Axes, level: float, names: Sequence[str]) -> None:
    """Draw the loss without context, with the names that it is for if it is not for most."""
    axes.axhline(level, color="0.6", linewidth=1, zorder=0)
    axes.annotate(
        f"without context: {', '.join(names)}" if names else "without context",
        (1, level),
        (0, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize="small",
        color="0.4",
    )


def line_styles(
    runs: Mapping[str, Sequence[Path]],
) -> Iterator[tuple[str, str, str, str, Path]]:
    """Yield (name, label, colour, dash, folder) of every run; a name's first run has its label."""
    for i, (name, folders) in enumerate(runs.items()):
        for j, folder in enumerate(folders):
            label = name if len(folders) == 1 else f"{name}, {len(folders)} seeds"
            colour = COLOURS[i % len(COLOURS)]
            dash = DASHES[(j or i // len(COLOURS)) % len(DASHES)]
            yield name, "_nolegend_" if j else label, colour, dash, folder


def loss_without_context(folder: Path) -> float | None:
    """Return a finished run's loss_without_context, or None if its loss has other parts too."""
    path = folder / "checkpoint/training.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("held_out_parts"):
        return None
    level: float | None = summary.get("loss_without_context")
    return level


def read_log(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, loss and held-out loss of every step; NaN if that was not measured."""
    if not path.is_file():
        raise Unavailable(f"{path} does not exist; name output folders of training.pretrain.")
    with path.open(newline="", encoding="utf-8") as file:
        # A running process may have written half of its last row.
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    if not rows:
        raise Unavailable(f"{path} has no step yet.")
    return (
        np.array([float(row["tokens"]) for row in rows]),
        np.array([float(row["loss"]) for row in rows]),
        np.array([float(row["held_out_loss"] or "nan") for row in rows]),
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    parser = Parser(prog="drbert-curves", description="Draw the losses of pretraining runs.")
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of training.pretrain")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    options = parser.parse_args(arguments)
    draw({"pretraining loss": {run.name: [run] for run in options.runs}}, options.out)
    return 0


def run() -> None:
    """Run the console script drbert-curves."""
    finish(main)


if __name__ == "__main__":
    run()
