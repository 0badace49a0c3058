"""
Run every benchmark of the CPU service, one after the other, into one page.

    python -m benchmarks all --short                                   twelve minutes
    python -m benchmarks all --texts TEXTS --out benchmarks/RESULTS.md
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import batching, convbert, memory, overhead, peers, roofline, startup
from benchmarks.harness.findings import Findings, markdown, read, write
from benchmarks.harness.models_under_test import batch_shapes, model_under_test
from benchmarks.harness.texts import TEXTS, read_texts
from benchmarks.peers import rerank
from command import CommandError, Parser, Unavailable

FEW_PEERS = ("Infinity (torch engine)", "ORTModel int8", "OpenVINO fp32")


def main(arguments: Sequence[str]) -> int:
    """Run all benchmarks; raise Unavailable if one could not be measured."""
    parser = Parser(
        prog="python -m benchmarks all", description="Run every benchmark of the CPU service."
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="twelve minutes: fewer rounds, shapes and peers' connections",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="file with the texts to send, one per line (default: bundled texts)",
    )
    parser.add_argument(
        "--gate",
        type=Path,
        help="file with 5,000 texts or more that gate the example's int8; without it, int8 is"
        " ungated",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write a Markdown page and its numbers as JSON, after each benchmark",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the benchmarks that --out already has and measure the rest",
    )
    options = parser.parse_args(arguments)
    # The page must not name private paths.
    placeholders = {str(options.texts): "TEXTS", str(options.gate): "GATE"}
    words = [placeholders.get(word, word) for word in arguments if word != "--resume"]
    command = shlex.join(["python", "-m", "benchmarks", "all", *words])
    stored: dict[str, Findings] = {}
    if options.resume and options.out is not None:
        for findings in read(options.out, here_only=True):
            if findings.tables:
                stored[findings.name] = findings
    if options.gate is not None:
        model_under_test("mini", options.gate)
    results, failed = [], []
    benchmarks = plan(read_texts(options.texts), read_texts(options.texts, 2000), options.short)
    for name, run in benchmarks.items():
        try:
            results.append(stored.get(name) or run())
        except CommandError as error:
            failed.append(name)
            results.append(Findings(name, f"Not measured: {error}", []))
        print(markdown(results[-1]), flush=True)
        if options.out is not None:
            write(options.out, command, results)
    print(_summary(results))
    if failed:
        raise Unavailable(f"Not measured: {', '.join(failed)}; the page says why.")
    return 0


def _summary(results: Sequence[Findings]) -> str:
    targets = [target for findings in results for target in findings.targets]
    missed = [target.name for target in targets if target.holds is False]
    names = f": {'; '.join(missed)}" if missed else ""
    return f"{len(targets)} targets, {len(missed)} missed{names}."


def plan(
    texts: Sequence[str], many_texts: Sequence[str], short: bool
) -> dict[str, Callable[[], Findings]]:
    """Return the benchmarks by name, in order, each ready to be called.

    `many_texts` are for the benchmark of batching, which needs a backlog.
    """
    rounds = 3 if short else 7
    return {
        "roofline": lambda: roofline.measure("base", rounds, batch_shapes(short)),
        "startup": lambda: startup.measure(("mini", "base"), 1 if short else 5),
        "memory": lambda: memory.measure(("mini",), short),
        "batching": lambda: batching.measure(
            "mini", many_texts, 2 if short else 7, 2.0 if short else 5.0
        ),
        "convbert": lambda: convbert.measure(
            ("small",) if short else ("small", "base"), batch_shapes(short), rounds
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
        # The big model's targets are about these peers. All peers take longer to start than a
        # short run may.
        "peers base": lambda: (
            peers.measure(("base",), texts, 1, 2, FEW_PEERS, (32,))
            if short
            else peers.measure(("base",), texts, 4, 6)
        ),
        "rerank mini": lambda: rerank.measure(
            ("mini",), texts, 1 if short else 3, 2 if short else 6
        ),
    }
