"""
Draws the losses of pretraining runs over the tokens they saw.

    python -m training.curves build/training/bert-mini build/training/drbert-mini --out losses.svg
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from command import Parser, Unavailable, finish

# Told apart by colour-blind eyes (Okabe and Ito), and by their dashes.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
DASHES = ("-", "--", "-.", ":")
SMOOTHED_OVER = 0.02
"""The share of a run over which the training loss is averaged."""
SHOWN_FROM = 0.1
"""The share of a run after which its losses fit into the picture: the fall of the first steps would
hide where runs differ.
"""


def draw(panels: Mapping[str, Mapping[str, Sequence[Path]]], out: Path) -> None:
    """An SVG with a panel for each kind of loss, in it a colour for each name and a line for each
    of its runs.

    Training loss as a line, a dash for each run of a name; held-out loss as points. A grey line
    stands where a finished run would be that learned nothing from context.
    """
    mpl.rcParams["svg.hashsalt"] = "losses"  # the same numbers, the same file
    figure = Figure(figsize=(6.5 * len(panels), 4.5), layout="constrained")
    for axes, (title, named) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        shown: list[float] = []
        levels: dict[float, list[str]] = {}
        for name, colour, dash, folder in styled(named):
            tokens, loss, held_out = read_log(folder / "log.csv")
            window = max(1, round(SMOOTHED_OVER * len(loss)))
            smooth = np.convolve(loss, np.ones(window) / window, "valid")
            axes.plot(
                tokens[window - 1 :] / 1e6, smooth, dash, color=colour, linewidth=1, label=name
            )
            there = ~np.isnan(held_out)
            axes.plot(tokens[there] / 1e6, held_out[there], "o", color=colour, markersize=3)
            shown += [*smooth[round(SHOWN_FROM * len(smooth)) :], *held_out[there]]
            for level in without_context(folder):
                if name not in (whose := levels.setdefault(round(level, 2), [])):
                    whose.append(name)
        for level, whose in sorted(levels.items()):
            axes.axhline(level, color="0.6", linewidth=1, zorder=0)
            few = f": {', '.join(whose)}" if len(whose) < len(named) / 2 else ""
            axes.annotate(
                f"without context{few}",
                (1, level),
                (0, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize="small",
                color="0.4",
            )
        shown += levels
        room = 0.05 * (max(shown) - min(shown)) or 1.0
        axes.set(
            title=title,
            xlabel="tokens (millions)",
            ylabel="loss (nats); points: held out",
            ylim=(min(shown) - room, max(shown) + room),
        )
        axes.legend(frameon=False, loc="lower left")  # where falling curves leave room
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, format="svg", metadata={"Date": None})


def styled(named: Mapping[str, Sequence[Path]]) -> Iterator[tuple[str, str, str, Path]]:
    """(label, colour, dash, folder) of every run; the first of a name has the label."""
    for i, (name, folders) in enumerate(named.items()):
        for j, folder in enumerate(folders):
            label = (
                "_nolegend_"
                if j
                else name
                if len(folders) == 1
                else f"{name}, {len(folders)} seeds"
            )
            yield (
                label,
                COLOURS[i % len(COLOURS)],
                DASHES[(j or i // len(COLOURS)) % len(DASHES)],
                folder,
            )


def without_context(folder: Path) -> list[float]:
    """The run's own loss_without_context, if it is finished, has one, and it is its whole loss."""
    told = folder / "checkpoint/training.json"
    found = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    return (
        [found["loss_without_context"]]
        if "loss_without_context" in found and not found.get("held_out_parts")
        else []
    )


def read_log(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, loss and held-out loss (NaN where it was not measured) of every step."""
    if not path.is_file():
        raise Unavailable(f"{path} does not exist; name folders of training.pretrain.")
    with path.open(newline="", encoding="utf-8") as file:
        # A run that goes on may have written half of its last row.
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    if not rows:
        raise Unavailable(f"{path} has no step yet.")
    return (
        np.array([float(row["tokens"]) for row in rows]),
        np.array([float(row["loss"]) for row in rows]),
        np.array([float(row["held_out_loss"] or "nan") for row in rows]),
    )


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m training.curves", description="Draw the losses of pretraining runs."
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of training.pretrain")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    given = parser.parse_args(arguments)
    draw({"pretraining loss": {run.name: [run] for run in given.runs}}, given.out)
    return 0


if __name__ == "__main__":
    finish(main)
