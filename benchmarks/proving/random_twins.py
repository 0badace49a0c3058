"""
Two classifiers of BERT-base's size with random weights, exported: twins for a proof at that size.

    python -m benchmarks random_twins artifacts/random-base

Time depends on the graph and not on what the weights say, so random ones stand in for trained ones;
subnormal numbers, the one way in which weights could matter, are counted and said.
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
    parser = Parser(
        prog="python -m benchmarks random_twins",
        description="Export two classifiers with random weights.",
    )
    parser.add_argument("out", type=Path, help="the folder for the artifacts bert and drbert")
    parser.add_argument("--size", choices=tuple(SIZES), default="base")
    given = parser.parse_args(arguments)
    for seed, name in enumerate(("bert", "drbert")):
        with tempfile.TemporaryDirectory() as temporary:
            export(
                str(write_checkpoint(Path(temporary) / name, given.size, seed)),
                given.out / name,
                variants=("cpu-fp32",),
            )
    compared = identity.compare(given.out / "bert", given.out / "drbert")
    print(identity.describe(compared))
    return 0 if compared["same"] else 1
