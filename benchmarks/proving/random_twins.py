"""
Export two classifiers of BERT-base's size with random weights: twins for a proof at that size.

    python -m benchmarks random_twins artifacts/random-base

Time depends on the graph and not on the weights, so random weights serve. The one exception is
subnormal numbers; they are counted and reported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.checkpoints import SIZES, write_checkpoint
from command import Parser
from export.pipeline import export
from proof.verdict import identity


def main(arguments: Sequence[str]) -> int:
    """Export the twins and compare their graphs; return 1 if they do not do the same work."""
    parser = Parser(
        prog="python -m benchmarks random_twins",
        description="Export two classifiers with random weights.",
    )
    parser.add_argument("out", type=Path, help="folder for the artifacts bert and drbert")
    parser.add_argument("--size", choices=tuple(SIZES), default="base")
    parser.add_argument(
        "--variants",
        default="cpu-fp32",
        help="comma-separated variants to export (default: cpu-fp32)",
    )
    options = parser.parse_args(arguments)
    for seed, name in enumerate(("bert", "drbert")):
        with tempfile.TemporaryDirectory() as temporary:
            export(
                str(write_checkpoint(Path(temporary) / name, options.size, seed)),
                options.out / name,
                variants=tuple(options.variants.split(",")),
            )
    compared = identity.compare(options.out / "bert", options.out / "drbert")
    print(identity.describe(compared))
    return 0 if compared["same"] else 1
