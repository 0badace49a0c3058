"""
How should waiting texts be batched? Each choice of the batcher, measured against its alternatives.

    python -m benchmarks batching [--short] [--texts FILE] [--out FILE]

* padding   share of padding among the computed tokens, for four policies, three kinds of traffic
  and three backlogs
* packing   several texts in a row against a row for each text: throughput and latency
* lengths   exact lengths against the grid: time of a shape's first and later runs, and the memory
  that it keeps
* streams   one stream with all processors against one stream for each of them
* waiting   a batch at once, of the texts that are there, against a wait of some milliseconds
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov

from benchmarks.harness.findings import Findings, Table, Target, at_most, markdown, spread, write
from benchmarks.harness.models_under_test import (
    ModelUnderTest,
    model_under_test,
    unpacked_classifier,
)
from benchmarks.harness.processes import anonymous_bytes
from benchmarks.harness.texts import TEXTS, read_texts
from command import Parser
from service.batching.batcher import Batcher, BatchStats
from service.batching.packing import MAX_TEXTS, Packing
from service.batching.queue import BatchLimits
from service.batching.shapes import CPU, PACKED, Grid, Shapes
from service.classifier import Classifier, Encoded
from service.host import cpus
from service.runtimes.auto import Choice, load

BATCH, TOKENS = 16, 4096
"""Most texts and most tokens of a batch."""
WAITS_MS = (0, 2, 10)
PADDING = 0.05
"""Largest share of padding under the largest backlog."""
BACKLOGS = (32, 64, 2000)
LOOP = "Closed loop over the batcher and the engine, without HTTP."

Part = tuple[Table, list[Target]]
"""The result of one of the five measurements."""


def main(arguments: Sequence[str]) -> int:
    """Measure the batcher's choices and print the tables."""
    parser = Parser(
        prog="python -m benchmarks batching",
        description="Measure the batcher's choices against their alternatives.",
    )
    parser.add_argument("--short", action="store_true", help="fewer rounds")
    parser.add_argument("--size", choices=("base", "mini", "tiny"), default="mini")
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="file with the texts to batch, one per line (default: bundled texts)",
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    options = parser.parse_args(arguments)
    findings = measure(
        options.size,
        read_texts(options.texts, 2000),
        rounds=2 if options.short else 7,
        seconds=2.0 if options.short else 5.0,
    )
    print(markdown(findings))
    if options.out is not None:
        write(options.out, "python -m benchmarks batching", [findings])
    return 0


def measure(size: str, texts: Sequence[str], rounds: int, seconds: float) -> Findings:
    """Return all five tables for the model of that size."""
    model = model_under_test(size)
    tables, targets = [], []
    parts = (
        partial(padding, model, texts),
        partial(packing, model, texts, rounds, seconds),
        partial(lengths, model, rounds),
        partial(streams, model, rounds),
        partial(waiting, model, texts, rounds, seconds),
    )
    for part in parts:
        table, part_targets = part()
        tables.append(table)
        targets += part_targets
    return Findings(
        "batching",
        f"How should waiting texts be batched ({size}, {model.variants[-1]},"
        f" {cpus.usable()} processor(s))?",
        tables,
        targets,
    )


# Padding: the batches that each policy makes of a backlog, counted.


@dataclass(frozen=True)
class Length:
    """A text of which only the length matters."""

    tokens: int


@dataclass
class CountingModel:
    """A model that only records the lengths in its batches."""

    shapes: Shapes
    padding_invariant: bool = True
    batches: list[list[int]] = field(default_factory=list)

    @property
    def packing(self) -> Packing | None:
        """Packing of the grid, if it has one."""
        return self.shapes.packing

    def padded_length(self, tokens: int) -> int:
        """Return the length of a row for a text of `tokens` tokens."""
        return self.shapes.length(tokens)

    def has_run(self, rows: int, length: int, texts: int) -> bool:
        """Return that no shape is new."""
        return True

    def start(
        self, batch: Sequence[Length], _layout: object = None, /
    ) -> Callable[[], Collection[Any]]:
        """Record a batch; the returned function returns an empty answer for each text."""
        self.batches.append([text.tokens for text in batch])
        return lambda: [None] * len(batch)


@dataclass(frozen=True)
class Policy:
    """A way to batch the token counts of waiting texts."""

    name: str
    grid: Grid
    batches: Callable[[Sequence[int], Shapes], list[list[int]]]
    ours: bool = False
    """Whether it is the service's own batcher, which has a target."""

    def padding(self, backlogs: Sequence[Sequence[int]], shapes: Shapes) -> tuple[float, float]:
        """Return the share of padding among the computed tokens, and the mean texts per batch."""
        batches = [batch for backlog in backlogs for batch in self.batches(backlog, shapes)]
        computed = sum(_computed_tokens(batch, shapes) for batch in batches)
        share = 1 - sum(map(sum, batches)) / computed
        return share, sum(map(len, backlogs)) / len(batches)


def padding(model: ModelUnderTest, texts: Sequence[str]) -> Part:
    """Count the padding of each policy, for each kind of traffic and backlog."""
    policies = (
        Policy("in order of arrival", CPU, lambda tokens, _: _split(tokens)),
        Policy("sorted", CPU, lambda tokens, _: _split(sorted(tokens))),
        Policy("ours, unpacked", CPU, _service_batches, ours=True),
        Policy("ours, packed", PACKED, _service_batches, ours=True),
    )
    rows, targets = [], []
    for kind, lengths in _traffic(model, texts).items():
        for backlog in BACKLOGS:
            # The largest backlog, which the target is about, is all of the traffic.
            size = backlog if backlog < max(BACKLOGS) else len(lengths)
            begins = range(0, len(lengths) - size + 1, size)
            backlogs = [lengths[begin : begin + size] for begin in begins]
            for policy in policies:
                shapes = Shapes(max(lengths), grid=policy.grid)
                share, per_batch = policy.padding(backlogs, shapes)
                rows.append([kind, f"{size:,}", policy.name, f"{share:.1%}", f"{per_batch:.1f}"])
                if policy.ours and backlog == max(BACKLOGS):
                    name = f"padding under backlog, {kind}, {policy.name.removeprefix('ours, ')}"
                    targets.append(at_most(name, 100 * share, 100 * PADDING, " %", 1))
    columns = ("traffic", "waiting texts", "policy", "padding, of all tokens", "texts per batch")
    note = (
        "That many texts wait when the first batch is made, and no text arrives before the last; at"
        f" most {TOKENS} tokens and {BATCH} texts per batch, or {MAX_TEXTS} packed texts. Sorted:"
        " the shortest first, whatever the order of arrival, as no service with waiting callers"
        " can."
    )
    return Table("Padding by backlog", columns, rows, note), targets


def _traffic(model: ModelUnderTest, texts: Sequence[str]) -> dict[str, list[int]]:
    """Return token counts by kind of traffic."""
    classifier = _classifier(model)
    rng = np.random.default_rng(0)
    return {
        "the texts' lengths": [
            classifier.encode(texts[i]).tokens for i in rng.permutation(len(texts))
        ],
        "60 to 110 tokens, uniform": rng.integers(60, 111, 2000).tolist(),
        "5 to 500 tokens, uniform": rng.integers(5, 501, 2000).tolist(),
    }


def _computed_tokens(batch: Sequence[int], shapes: Shapes) -> int:
    """Return the tokens of all rows, padding included."""
    if shapes.packing is None:
        return shapes.length(max(batch)) * len(batch)
    return shapes.packing.lay_out(batch).tokens


def _split(lengths: Sequence[int]) -> list[list[int]]:
    """Return batches in the given order, each within BATCH and TOKENS."""
    batches: list[list[int]] = []
    for tokens in lengths:
        if (
            batches
            and len(batches[-1]) < BATCH
            and max(*batches[-1], tokens) * (len(batches[-1]) + 1) <= TOKENS
        ):
            batches[-1].append(tokens)
        else:
            batches.append([tokens])
    return batches


def _service_batches(lengths: Sequence[int], shapes: Shapes) -> list[list[int]]:
    """Return the batches that the service's own batcher makes."""
    model = CountingModel(shapes)

    async def submit_all() -> None:
        batcher = Batcher(
            {"m": model},
            BatchLimits(shapes.max_batch_size, TOKENS, shapes.batch_size),
            max_queue_size=len(lengths),
        )
        request = asyncio.create_task(batcher.submit("m", [Length(tokens) for tokens in lengths]))
        await asyncio.sleep(0)
        batcher.start()
        await request
        await batcher.close(10)

    asyncio.run(submit_all())
    return model.batches


# Packing: several texts in a row, or a row for each text.


def packing(model: ModelUnderTest, texts: Sequence[str], rounds: int, seconds: float) -> Part:
    """Measure throughput and latency with and without packing, in turns."""
    classifiers = {
        "unpacked": unpacked_classifier(model.artifact, model.variants[-1], cpus.usable()),
        "packed": _classifier(model),
    }
    longest = model.artifact.manifest.max_tokens
    encoded_texts = [classifiers["unpacked"].encode(text) for text in texts]
    rng = np.random.default_rng(0)
    # A short row holds one of these and leaves half of it empty. Together with texts of one length
    # they are the worst case of packing.
    low, high = min(60, longest), min(110, longest)
    lengths = rng.integers(low, high + 1, len(encoded_texts)).tolist()
    long = [_text_of(tokens, encoded_texts) for tokens in lengths]
    for classifier in classifiers.values():
        classifier.warm_up(10)
    rows = []
    for kind, encoded, callers in (
        ("the texts", encoded_texts, 1),
        ("the texts", encoded_texts, 8),
        ("the texts", encoded_texts, 32),
        ("60 to 110 tokens, uniform", long, 32),
    ):
        loops: dict[str, list[LoopResult]] = {name: [] for name in classifiers}
        for _ in range(rounds):
            for name, classifier in classifiers.items():
                loop = _closed_loop(classifier, encoded, callers, 0, seconds / rounds)
                loops[name].append(asyncio.run(loop))
        for name, results in loops.items():
            rows.append([kind, str(callers), name, *_loop_cells(results, loops["unpacked"])])
    columns = ("traffic", "callers", "texts are", "texts/s", "by unpacked", "p50, ms", "p99, ms")
    return Table("Packed or unpacked", columns, rows, LOOP), []


def _text_of(tokens: int, texts: Sequence[Encoded]) -> Encoded:
    """Return a text of `tokens` tokens, made of the tokens of `texts`."""
    ids: list[int] = []
    for text in itertools.cycle(texts):
        ids += text.ids[1:-1]
        if len(ids) >= tokens - 2:
            break
    first, last = texts[0].ids[0], texts[0].ids[-1]
    return Encoded([first, *ids[: tokens - 2], last], [0] * tokens, False)


# Lengths: what an engine keeps for every shape.


def lengths(model: ModelUnderTest, rounds: int) -> Part:
    """Measure batches of every length, exact or rounded up to the grid."""
    longest = model.artifact.manifest.max_tokens
    grid = Shapes(longest).lengths
    exact = list(range(2, longest + 1))
    rounded = [next(length for length in grid if length >= tokens) for tokens in exact]
    rows = []
    for name, run_lengths in (("every length", exact), ("the grid's", rounded)):
        classifier = _classifier(model)
        before, passes = anonymous_bytes(os.getpid()), []
        for _ in range(1 + rounds):
            began = time.perf_counter()
            for length in run_lengths:
                classifier.runtime.start(_inputs(classifier, 4, length))()
            passes.append(time.perf_counter() - began)
        grown = anonymous_bytes(os.getpid()) - before
        rows.append(
            [
                name,
                str(len(set(run_lengths))),
                f"{1000 * passes[0] / len(run_lengths):.2f}",
                f"{1000 * min(passes[1:]) / len(run_lengths):.2f}",
                f"{grown / 2**20:.0f}",
            ]
        )
    columns = ("lengths", "shapes", "first run, ms", "later runs, ms", "memory kept, MiB")
    note = f"Batches of 4, one for every number of tokens from 2 to {longest}."
    return Table("Exact lengths or the grid's", columns, rows, note), []


# Streams: all processors on one batch, or a batch for each.


def streams(model: ModelUnderTest, rounds: int) -> Part:
    """Measure one stream with all threads against a stream for each thread, in turns."""
    threads = cpus.usable()
    variant = model.artifact.manifest.variants[model.variants[-1]]
    options = {
        "INFERENCE_PRECISION_HINT": ov.Type.bf16 if variant.precision == "bf16" else ov.Type.f32,
        "INFERENCE_NUM_THREADS": threads,
    }
    path = model.artifact.path(variant.files[0])
    # The LATENCY hint would choose the streams by itself.
    compiled = {
        count: ov.Core().compile_model(path, "CPU", options | {"NUM_STREAMS": count})
        for count in sorted({1, threads})
    }
    classifier = _classifier(model)
    rows = []
    for size, length in ((1, 32), (8, 32), (8, 128)):
        inputs = _inputs(classifier, size, length)
        results: dict[int, list[tuple[float, float]]] = {count: [] for count in compiled}
        for number in range(1 + rounds):
            for count, engine in compiled.items():
                result = _run_streams(engine, inputs, count)
                if number:  # The first round is a warm-up.
                    results[count].append(result)
        single = np.array([rate for rate, _ in results[1]])
        for count, pairs in results.items():
            rate, took = np.array(pairs).T
            rows.append(
                [
                    f"{size} × {length}",
                    str(count),
                    f"{np.median(took) * 1000:.1f}",
                    f"{size * np.median(rate):.0f}",
                    spread(rate / single),
                ]
            )
    columns = ("batch × length", "streams", "a batch takes, ms", "texts/s", "by one stream")
    note = f"{threads} thread(s) in all; as many batches in flight as streams."
    return Table("Streams", columns, rows, note), []


def _run_streams(engine: Any, inputs: dict[str, np.ndarray], count: int) -> tuple[float, float]:
    """Return batches per second and seconds per batch, with `count` requests in flight."""
    requests = [engine.create_infer_request() for _ in range(count)]
    times: list[float] = []

    def work(request: Any) -> None:
        for _ in range(6):
            began = time.perf_counter()
            request.infer(inputs)
            times.append(time.perf_counter() - began)

    workers = [threading.Thread(target=work, args=(request,)) for request in requests]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(times) / (time.perf_counter() - began), float(np.median(times))


# Waiting: a batch at once, or after a delay.


class DelayedBatcher(Batcher):
    """A batcher that waits up to `delay_s` for a full batch once the first text waits."""

    delay_s = 0.0

    def _next_batch(self, wait: bool) -> Any:
        if self.delay_s and wait:
            with self._changed:
                while not self.queue and not self._closing:
                    self._changed.wait()
                give_up = time.monotonic() + self.delay_s
                while (
                    len(self.queue) < self.limits.size
                    and not self._closing
                    and (remaining_s := give_up - time.monotonic()) > 0
                ):
                    self._changed.wait(remaining_s)
        return super()._next_batch(wait)


def waiting(model: ModelUnderTest, texts: Sequence[str], rounds: int, seconds: float) -> Part:
    """Measure throughput and latency with each delay of WAITS_MS, in turns."""
    classifier = _classifier(model)
    encoded = [classifier.encode(text) for text in texts]
    classifier.warm_up(10)
    rows = []
    for callers in (1, 8, 32):
        loops: dict[int, list[LoopResult]] = {delay: [] for delay in WAITS_MS}
        for _ in range(rounds):
            for delay in WAITS_MS:
                loop = _closed_loop(classifier, encoded, callers, delay / 1000, seconds / rounds)
                loops[delay].append(asyncio.run(loop))
        for delay, results in loops.items():
            name = f"{delay} ms" if delay else "none"
            rows.append([str(callers), name, *_loop_cells(results, loops[0])])
    columns = ("callers", "wait", "texts/s", "by no wait", "p50, ms", "p99, ms")
    return Table("Waiting for a fuller batch", columns, rows, LOOP), []


class LoopResult(NamedTuple):
    """The throughput and latency of a closed loop."""

    rate: float
    """Texts per second."""
    median_ms: float
    tail_ms: float
    """99th percentile."""


async def _closed_loop(
    classifier: Classifier,
    encoded: Sequence[Encoded],
    callers: int,
    delay_s: float,
    seconds: float,
) -> LoopResult:
    """Run callers with one text in flight each over a batcher and the engine."""
    batcher = DelayedBatcher(
        {"m": classifier},
        BatchLimits(classifier.shapes.max_batch_size, TOKENS, classifier.shapes.batch_size),
        on_batch=_ignore,
    )
    batcher.delay_s = delay_s
    batcher.start()
    times: list[float] = []
    until = time.perf_counter() + seconds

    async def call(first: int) -> None:
        i = first
        while (began := time.perf_counter()) < until:
            await batcher.submit("m", [encoded[i % len(encoded)]], math.inf)
            times.append(time.perf_counter() - began)
            i += callers

    await asyncio.gather(*(call(i) for i in range(callers)))
    await batcher.close(10)
    return LoopResult(
        len(times) / seconds,
        float(np.median(times)) * 1000,
        float(np.percentile(times, 99)) * 1000,
    )


def _loop_cells(results: Sequence[LoopResult], baseline: Sequence[LoopResult]) -> list[str]:
    """Return the median rate, its ratio to the baseline's of the same round, p50 and p99."""
    rate, median, tail = np.array(results).T
    relative = rate / np.array([result.rate for result in baseline])
    return [
        f"{np.median(rate):.0f}",
        spread(relative),
        f"{np.median(median):.1f}",
        f"{np.median(tail):.1f}",
    ]


def _ignore(batch: BatchStats) -> None:
    """Count nothing: the loops here time their own requests."""


def _classifier(model: ModelUnderTest) -> Classifier:
    """Return a classifier of the fastest variant on all usable processors."""
    choice = Choice(model.variants[-1], "openvino", "benchmark")
    return Classifier(model.artifact, load(model.artifact, choice, cpus.usable()))


def _inputs(classifier: Classifier, batch: int, length: int) -> dict[str, np.ndarray]:
    arrays = {
        "input_ids": np.full((batch, length), 7),
        "attention_mask": np.ones((batch, length), np.int64),
        "token_type_ids": np.zeros((batch, length), np.int64),
    }
    return {name: arrays[name] for name in classifier.manifest.inputs}
