"""
Every benchmark of the CPU service, one after the other, into one page.

    python -m benchmarks all --short                                   ten minutes
    python -m benchmarks all --texts TEXTS --out benchmarks/RESULTS.md
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import batching, convbert, memory, overhead, peers, roofline, startup
from benchmarks.harness.findings import Findings, markdown, read, write
from benchmarks.harness.models_under_test import shapes_of, subject
from benchmarks.harness.texts import TEXTS, read_lines
from command import CommandError, Parser, Unavailable

FEW_PEERS = ("Infinity (torch engine)", "ORTModel int8", "OpenVINO fp32")


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks all", description="Run every benchmark of the CPU service."
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="ten minutes: fewer rounds, shapes and peers' connections",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="texts to send, one a line (default: some that come along)",
    )
    parser.add_argument(
        "--gate",
        type=Path,
        help="5,000 texts or more by which the example's int8 is gated; without, it is ungated",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write a Markdown page and its numbers as JSON, after each benchmark",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out holds already and measure the rest"
    )
    given = parser.parse_args(arguments)
    # Where somebody's texts lie is nobody else's concern.
    names = {str(given.texts): "TEXTS", str(given.gate): "GATE"}
    command = shlex.join(
        [
            "python",
            "-m",
            "benchmarks",
            "all",
            *(names.get(word, word) for word in arguments if word != "--resume"),
        ]
    )
    done = (
        {one.name: one for one in read(given.out, here_only=True) if one.tables}
        if given.resume and given.out is not None
        else {}
    )
    if given.gate is not None:
        subject("mini", given.gate)
    found, failed = [], []
    for name, run in plan(
        read_lines(given.texts), read_lines(given.texts, 2000), given.short
    ).items():
        try:
            found.append(done.get(name) or run())
        except CommandError as error:
            failed.append(name)
            found.append(Findings(name, f"Not measured: {error}", []))
        print(markdown(found[-1]), flush=True)
        if given.out is not None:
            write(given.out, command, found)
    missed = [target.what for each in found for target in each.targets if target.holds is False]
    print(
        f"{sum(len(each.targets) for each in found)} targets, {len(missed)}"
        f" missed{': ' + '; '.join(missed) if missed else ''}."
    )
    if failed:
        raise Unavailable(f"Not measured: {', '.join(failed)}; the page says why.")
    return 0


def plan(
    texts: Sequence[str], many: Sequence[str], short: bool
) -> dict[str, Callable[[], Findings]]:
    rounds = 3 if short else 7
    return {
        "roofline": lambda: roofline.measure("base", rounds, shapes_of(short)),
        "startup": lambda: startup.measure(("mini", "base"), 1 if short else 5),
        "memory": lambda: memory.measure(("mini",), short),
        "batching": lambda: batching.measure(
            "mini", many, 2 if short else 7, 2.0 if short else 5.0
        ),
        "convbert": lambda: convbert.measure(
            ("small",) if short else ("small", "base"), shapes_of(short), rounds
        ),
        "overhead": lambda: overhead.measure(
            ("mini",) if short else ("mini", "base"), texts, 2 if short else 3, 3 if short else 10
        ),
        "peers mini": lambda: peers.measure(
            ("mini",),
            texts,
            1 if short else 4,
            2 if short else 6,
            connections=(1, 32) if short else peers.CONNECTIONS,
        ),
        # A big model's targets are of these peers; all of them take longer to start than a short
        # run may.
        "peers base": lambda: (
            peers.measure(("base",), texts, 1, 2, FEW_PEERS, (32,))
            if short
            else peers.measure(("base",), texts, 4, 6)
        ),
    }
