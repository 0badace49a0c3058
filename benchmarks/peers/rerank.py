"""
Compare rerankers: documents per second of one cross-encoder, a query with 32 documents a request.

    python -m benchmarks rerank [--short] [--texts FILE] [--sizes mini base] [--out FILE]

It runs as benchmarks/peers/compare.py does. Scores are compared with ours in fp32. A second table
compares our engine with itself: pairs packed into rows, and each pair in a row of its own.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.findings import Findings, Table, markdown, spread, write
from benchmarks.harness.models_under_test import (
    RERANKER,
    ModelUnderTest,
    model_under_test,
    unpacked_classifier,
)
from benchmarks.harness.texts import TEXTS, mix_lengths, read_texts
from benchmarks.peers.compare import PeerRun, ask, fastest, measure_run, start_all
from benchmarks.peers.peer import (
    UVICORN,
    Peer,
    checkpoint_variables,
    infinity,
    ours,
    uvicorn_app,
)
from command import CommandError, Parser
from service.classifier import Classifier
from service.host import cpus
from service.runtimes.auto import Choice, load

DOCUMENTS = 32
"""Documents of a request."""
CONNECTIONS = (1, 8)
TOLERATED, TOLERATED_ROUNDED = 0.01, 0.05
"""Largest difference of a score from ours in fp32, in fp32 and in a lower precision."""

Body = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Compare the rerankers and print the tables."""
    parser = Parser(
        prog="python -m benchmarks rerank",
        description="Compare our service with other servers of the same cross-encoder.",
    )
    parser.add_argument("--short", action="store_true", help="one short round")
    parser.add_argument("--sizes", nargs="+", choices=("base", "mini", "tiny"), default=("mini",))
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="file with queries and documents, one per line (default: bundled texts)",
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    options = parser.parse_args(arguments)
    findings = measure(
        options.sizes,
        read_texts(options.texts),
        rounds=1 if options.short else 3,
        seconds=3 if options.short else 6,
    )
    print(markdown(findings))
    if options.out is not None:
        write(options.out, "python -m benchmarks rerank", [findings])
    return 0


def measure(sizes: Sequence[str], texts: Sequence[str], rounds: int, seconds: float) -> Findings:
    """Return the rates and ratios of every reranker."""
    tables, values = [], {}
    bodies = requests(texts)
    for size in sizes:
        model = model_under_test(f"{RERANKER}{size}")
        runs, absent = run_all(model, bodies, rounds, seconds)
        tables += [_rates(size, runs, absent), _packing(size, model, bodies[0], seconds)]
        values[size] = {
            run.peer.name: {"requests_per_s": dict(run.rates), "p50_ms": dict(run.medians)}
            for run in runs
        }
    return Findings(
        f"rerank {' '.join(sizes)}",
        f"How many documents per second are ranked, {DOCUMENTS} a request?",
        tables,
        (),
        values,
    )


def requests(texts: Sequence[str]) -> list[Body]:
    """Return requests: each text in turn is the query, and the texts after it the documents."""
    mixed = mix_lengths(texts)
    return [
        {
            "query": mixed[start],
            "documents": [
                mixed[(start + offset) % len(mixed)] for offset in range(1, DOCUMENTS + 1)
            ],
        }
        for start in range(len(mixed))
    ]


def rerankers(native: set[str]) -> list[Peer]:
    """Return all rerankers, ours first, in every precision that the processor has."""
    variants = [("cpu-fp32", "fp32"), ("cpu-bf16", "bf16"), ("cpu-int8", "int8")]
    precisions = {"fp32": "f32", "bf16": "bf16", "int8": "i8"}
    servers = [ours(*each) for each in variants if precisions[each[1]] in native]
    others = [infinity("torch"), infinity("optimum")]
    cross_encoder = Peer(
        "FastAPI + sentence-transformers CrossEncoder",
        "fp32",
        uvicorn_app("app_cross_encoder"),
        _unchanged,
        scores,
        requirements=("sentence-transformers==6.2.0", "torch==2.13.0", *UVICORN),
        environment=checkpoint_variables(),
        path="/rerank",
        engine="torch",
    )
    return [
        *(replace(peer, path="/rerank", body=_unchanged, answer=scores) for peer in servers),
        *(replace(peer, path="/rerank", body=_with_model, answer=scores) for peer in others),
        cross_encoder,
    ]


def _unchanged(body: Body) -> Body:
    return body


def _with_model(body: Body) -> Body:
    """Return a request that names the model, which Infinity requires."""
    return body | {"model": "m"}


def scores(response: Any) -> list[float]:
    """Return the score of each document, in the request's order."""
    results = sorted(response["results"], key=lambda each: int(each["index"]))
    return [float(each["relevance_score"]) for each in results]


def run_all(
    model: ModelUnderTest, bodies: Sequence[Body], rounds: int, seconds: float
) -> tuple[list[PeerRun], dict[str, str]]:
    """Measure every reranker that starts, in turns; return the runs and the others' errors."""
    with contextlib.ExitStack() as stack:
        runs, absent = start_all(model, rerankers(cpus.native_precisions()), stack)
        expected = _ask(runs[0], bodies[0])
        for run in runs:
            run.furthest = float(np.abs(_ask(run, bodies[0]) - expected).max())
            if run.furthest > (TOLERATED if run.peer.precision == "fp32" else TOLERATED_ROUNDED):
                raise CommandError(
                    f"{run.peer.name} ranks differently from our fp32: a score differs by"
                    f" {run.furthest:.2f}."
                )
        for number in range(rounds):
            for count in CONNECTIONS:
                # Every other round backwards, so that drift within a round favours no peer.
                for run in runs[:: -1 if number % 2 else 1]:
                    sent = [json.dumps(run.peer.body(body)) for body in bodies]
                    measure_run(run, sent, count, seconds)
    return runs, absent


def _ask(run: PeerRun, body: Body) -> np.ndarray:
    """Return the scores of a peer that is paused."""
    with run.server.unpaused():
        return np.array(run.peer.answer(ask(run, run.peer.body(body))))


def _rates(size: str, runs: Sequence[PeerRun], absent: dict[str, str]) -> Table:
    """Return the table of rates, and of our best rate by each peer's."""
    most = CONNECTIONS[-1]
    rates = {run.peer.precision: np.array(run.rates[most]) for run in runs if run.peer.is_ours}
    best = fastest(rates)
    rows = [
        [
            run.peer.name,
            run.peer.engine,
            *(f"{DOCUMENTS * np.median(run.rates[count]):,.0f}" for count in CONNECTIONS),
            f"{np.median(run.medians[CONNECTIONS[0]]):.1f}",
            f"{run.furthest:.0e}",
            "" if run.peer.is_ours else spread(rates[best] / np.array(run.rates[most])),
            "" if run.peer.is_ours else spread(rates["fp32"] / np.array(run.rates[most])),
        ]
        for run in runs
    ]
    rows += [
        [name, error.split(": ", 1)[-1][:120], *["–"] * (len(CONNECTIONS) + 4)]
        for name, error in absent.items()
    ]
    columns = (
        "server",
        "engine",
        *(f"documents/s, {count} at a time" for count in CONNECTIONS),
        "p50 of a request alone, ms",
        "furthest score",
        f"our best ({best}) by it, {most} at a time",
        f"ours in fp32 by it, {most} at a time",
    )
    return Table(f"{size} reranker: documents a second", columns, rows)


def _packing(size: str, model: ModelUnderTest, body: Body, seconds: float) -> Table:
    """Return the table of our engine with packed pairs, by one row for each pair."""
    rows = []
    for variant in model.variants:
        runtime = load(model.artifact, Choice(variant, "openvino", "benchmark"), cpus.usable())
        packed, alone = (
            Classifier(model.artifact, runtime),
            unpacked_classifier(model.artifact, variant, cpus.usable()),
        )
        times: list[tuple[float, float]] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 3:
            times.append((_seconds(packed, body), _seconds(alone, body)))
        packed_s, alone_s = (float(np.median(column)) for column in zip(*times, strict=True))
        rows.append(
            [
                variant,
                f"{packed_s * 1e3:.1f}",
                f"{alone_s * 1e3:.1f}",
                spread(np.array([before / after for after, before in times])),
            ]
        )
    columns = ("variant", "packed, ms", "one row a pair, ms", "times as fast")
    return Table(f"{size} reranker: the engine, one request of {DOCUMENTS} pairs", columns, rows)


def _seconds(classifier: Classifier, body: Body) -> float:
    pairs = [classifier.encode(body["query"], document) for document in body["documents"]]
    started = time.perf_counter()
    classifier.predict_all(pairs)
    return time.perf_counter() - started
