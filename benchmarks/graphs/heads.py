"""
What does it save to compute several classifiers of one encoder as one model with several heads?

    python -m benchmarks heads --out benchmarks/heads.md

Three classifiers with random weights and one encoder run the same batches one after the other, and
as one model with three heads, in turns, on one thread. Both must answer alike.
"""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.graphs.last_layer import BATCHES, batch_of, classifier
from benchmarks.harness import pages
from benchmarks.harness.checkpoints import SIZES, write_checkpoint
from command import Parser
from export.pipeline import export
from service.artifact import read_artifact
from service.classifier import Classifier, Encoded

HEADS = ("first", "second", "third")
ENCODER = ("bert.embeddings.", "bert.encoder.")
"""Beginnings of the names of weights that the classifiers share."""
VARIANT = "cpu-fp32"
TOLERANCE = 1e-4
"""Largest difference of a logit that is rounding."""


def main(arguments: Sequence[str]) -> int:
    """Print a table with a row for each batch; return 1 if answers differ."""
    parser = Parser(
        prog="python -m benchmarks heads",
        description="Compare one model with three heads with three models.",
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="base")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="seconds for each batch (default: 10)"
    )
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoints = write_heads(folder, options.size)
        export(checkpoints, folder / "several", variants=[VARIANT])
        for head, checkpoint in checkpoints.items():
            export(checkpoint, folder / f"alone-{head}", variants=[VARIANT])
        several, *alone = (
            classifier(read_artifact(folder / name), VARIANT, narrows=True)
            for name in ("several", *(f"alone-{head}" for head in HEADS))
        )
        rows = [
            row(name, batch_of(tokens), several, alone, options.seconds)
            for name, tokens in BATCHES.items()
        ]
    text = "\n".join(
        [
            f"Three classifiers of BERT-{options.size}'s size with random weights and one encoder,"
            f" {VARIANT}, one thread. Medians, and the quartiles of the ratio.",
            "",
            "| batch | three models, ms | one with three heads, ms | ratio |",
            "|---|--:|--:|---|",
            *(line for line, _ in rows),
        ]
    )
    print(text)
    if options.out is not None:
        command = shlex.join(["python", "-m", "benchmarks", "heads", *arguments])
        pages.write(options.out, "Three heads by three models", command, text)
    return 0 if all(same for _, same in rows) else 1


def write_heads(folder: Path, size: str) -> dict[str, str]:
    """Write a checkpoint for each of HEADS, all on the first one's encoder."""
    checkpoints = {}
    shared: dict[str, torch.Tensor] = {}
    for seed, head in enumerate(HEADS):
        checkpoint = write_checkpoint(folder / head, size, seed)
        weights = load_file(checkpoint / "model.safetensors")
        shared = shared or {
            name: tensor for name, tensor in weights.items() if name.startswith(ENCODER)
        }
        save_file(weights | shared, checkpoint / "model.safetensors", {"format": "pt"})
        config = json.loads((checkpoint / "config.json").read_text())
        config["id2label"] = {str(index): f"{head} {index}" for index in range(2)}
        (checkpoint / "config.json").write_text(json.dumps(config))
        checkpoints[head] = str(checkpoint)
    return checkpoints


def row(
    name: str,
    batch: Sequence[Encoded],
    several: Classifier,
    alone: Sequence[Classifier],
    seconds: float,
) -> tuple[str, bool]:
    """Run a batch by all in turns; return its row, and whether the answers are the same."""
    expected = np.concatenate([model.predict(batch) for model in alone], axis=1)
    is_same = float(np.abs(several.predict(batch) - expected).max()) < TOLERANCE
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        first = len(times) % 2 == 0
        took_several = _seconds([several], batch) if first else 0.0
        took_alone = _seconds(alone, batch)
        times.append((took_alone, took_several or _seconds([several], batch)))
    alone_s, several_s = (float(np.median(column)) for column in zip(*times, strict=True))
    low, middle, high = np.quantile([after / before for before, after in times], (0.25, 0.5, 0.75))
    note = "" if is_same else " (other answers)"
    return (
        f"| {name} | {alone_s * 1e3:.2f} | {several_s * 1e3:.2f} |"
        f" {middle:.3f} ({low:.3f}–{high:.3f}){note} |"
    ), is_same


def _seconds(models: Sequence[Classifier], batch: Sequence[Encoded]) -> float:
    started = time.perf_counter()
    for model in models:
        model.predict(batch)
    return time.perf_counter() - started
