"""
How should waiting texts be put into batches? Each choice of the batcher beside what it was chosen
against.

    python -m benchmarks batching [--short] [--texts FILE] [--out FILE]

* padding   what share of the computed tokens is padding, for four policies, two kinds of traffic
  and three backlogs
* sharing   texts that share rows against texts that have a row each: the rate, and what a request
  takes
* lengths   exact lengths against the grid: time on shapes seen for the first time and again, and
  memory kept for them
* streams   one stream with all processors against one stream for each of them
* waiting   a batch at once, of what is there, against a wait of some milliseconds for more
"""

from __future__ import annotations

import asyncio
import itertools
import math
import resource
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from benchmarks.harness.findings import Findings, Table, Target, at_most, markdown, spread, write
from benchmarks.harness.models_under_test import Subject, a_row_each, subject
from benchmarks.harness.texts import TEXTS, read_lines
from command import Parser
from service.batching.batcher import Batch, Batcher
from service.batching.packing import MAX_TEXTS, Packing
from service.batching.shapes import CPU, PACKED, Grid, Shapes
from service.classifier import Classifier, Encoded
from service.host import cpus
from service.runtimes.auto import Choice, load

BATCH, TOKENS = 16, 4096
WAITS_MS = (0, 2, 10)
PADDING = 0.05
BACKLOGS = (32, 64, 2000)
LOOP = "Closed loop over the batcher and the engine, without HTTP."


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks batching",
        description="Measure the batcher's choices against others.",
    )
    parser.add_argument("--short", action="store_true", help="fewer rounds")
    parser.add_argument("--size", choices=("base", "mini", "tiny"), default="mini")
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="texts whose lengths are batched, one a line (default: some that come along)",
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    given = parser.parse_args(arguments)
    found = measure(
        given.size,
        read_lines(given.texts, 2000),
        rounds=2 if given.short else 7,
        seconds=2.0 if given.short else 5.0,
    )
    print(markdown(found))
    if given.out is not None:
        write(given.out, "python -m benchmarks batching", [found])
    return 0


def measure(size: str, texts: Sequence[str], rounds: int, seconds: float) -> Findings:
    each = subject(size)
    tables, targets = [], []
    parts = (
        partial(padding, each, texts),
        partial(sharing, each, texts, rounds, seconds),
        partial(lengths, each, rounds),
        partial(streams, each, rounds),
        partial(waiting, each, texts, rounds, seconds),
    )
    for part in parts:
        table, more = part()
        tables.append(table)
        targets += more
    return Findings(
        "batching",
        f"How should waiting texts be put into batches ({size}, {each.variants[-1]},"
        f" {cpus.usable()} processor(s))?",
        tables,
        targets,
    )


# Padding: what the batcher makes of a backlog, counted.


@dataclass(frozen=True)
class Length:
    tokens: int


@dataclass
class Counting:
    """A model that only notes how long its batches are."""

    shapes: Shapes
    padding_safe: bool = True
    batches: list[list[int]] = field(default_factory=list)

    @property
    def packing(self) -> Packing | None:
        return self.shapes.packing

    def padded_length(self, tokens: int) -> int:
        return self.shapes.length(tokens)

    def start(self, batch: Sequence[Length], /) -> Callable[[], Collection[Any]]:
        self.batches.append([item.tokens for item in batch])
        return lambda: [None] * len(batch)


def padding(each: Subject, texts: Sequence[str]) -> tuple[Table, list[Target]]:
    classifier = _classifier(each)
    draw = np.random.default_rng(0)
    traffic = {
        "the texts' lengths": [
            classifier.encode(texts[i]).tokens for i in draw.permutation(len(texts))
        ],
        "60 to 110 tokens alike": draw.integers(60, 111, 2000).tolist(),
        "5 to 500 tokens alike": draw.integers(5, 501, 2000).tolist(),
    }
    policies: dict[str, tuple[Grid, Callable[[list[int], Shapes], list[list[int]]]]] = {
        "in order of arrival": (CPU, lambda waiting, shapes: _cut(waiting)),
        "sorted": (CPU, lambda waiting, shapes: _cut(sorted(waiting))),
        "ours, a row each": (CPU, _ours),
        "ours, shared rows": (PACKED, _ours),
    }
    rows, targets = [], []
    for kind, all_of_them in traffic.items():
        for backlog in BACKLOGS:
            # All of them for the largest, which is what the target is about.
            size = backlog if backlog < max(BACKLOGS) else len(all_of_them)
            parts = [all_of_them[i : i + size] for i in range(0, len(all_of_them) - size + 1, size)]
            for policy, (grid, batches_of) in policies.items():
                shapes = Shapes(max(all_of_them), grid=grid)
                batches = [batch for part in parts for batch in batches_of(part, shapes)]
                share = 1 - sum(map(sum, batches)) / sum(
                    _computed(batch, shapes) for batch in batches
                )
                rows.append(
                    [
                        kind,
                        f"{size:,}",
                        policy,
                        f"{share:.1%}",
                        f"{sum(map(len, parts)) / len(batches):.1f}",
                    ]
                )
                if batches_of is _ours and backlog == max(BACKLOGS):
                    targets.append(
                        at_most(
                            f"padding under backlog, {kind}, {policy.removeprefix('ours, ')}",
                            100 * share,
                            100 * PADDING,
                            " %",
                            1,
                        )
                    )
    return (
        Table(
            "Padding by backlog",
            (
                "traffic",
                "texts that wait",
                "policy",
                "padding, of all tokens computed",
                "texts a batch",
            ),
            rows,
            "So many texts wait when the first batch is made, and none comes before the last; at"
            f" most {TOKENS} tokens a batch and {BATCH} texts, or {MAX_TEXTS} that share rows."
            " Sorted: the shortest first, whoever came when, as no service can with callers who"
            " wait.",
        ),
        targets,
    )


def _computed(batch: Sequence[int], shapes: Shapes) -> int:
    """Tokens of all rows, padding counted."""
    if shapes.packing is None:
        return shapes.length(max(batch)) * len(batch)
    return shapes.packing.lay_out(batch).tokens


def _cut(waiting: Sequence[int]) -> list[list[int]]:
    """Batches in order, within both limits."""
    batches: list[list[int]] = []
    for tokens in waiting:
        if (
            batches
            and len(batches[-1]) < BATCH
            and max(*batches[-1], tokens) * (len(batches[-1]) + 1) <= TOKENS
        ):
            batches[-1].append(tokens)
        else:
            batches.append([tokens])
    return batches


def _ours(waiting: Sequence[int], shapes: Shapes) -> list[list[int]]:
    """What the service's own batcher makes of them."""
    model = Counting(shapes)

    async def all_at_once() -> None:
        batcher = Batcher(
            {"m": model},
            shapes.max_batch_size,
            TOKENS,
            max_waiting=len(waiting),
            batch_size=shapes.batch_size,
        )
        asked = asyncio.create_task(batcher.submit("m", [Length(tokens) for tokens in waiting]))
        await asyncio.sleep(0)
        batcher.start()
        await asked
        await batcher.close(10)

    asyncio.run(all_at_once())
    return model.batches


# Sharing: texts in one row, or a row each.


def sharing(
    each: Subject, texts: Sequence[str], rounds: int, seconds: float
) -> tuple[Table, list[Target]]:
    ways = {
        "a row each": a_row_each(each.artifact, each.variants[-1], cpus.usable()),
        "shared rows": _classifier(each),
    }
    longest = each.artifact.manifest.max_tokens
    theirs = [ways["a row each"].encode(text) for text in texts]
    draw = np.random.default_rng(0)
    # Of these a short row holds one and leaves half of it; it is what sharing is worst at, beside
    # texts of one length.
    long = [
        _cut_to(tokens, theirs)
        for tokens in draw.integers(min(60, longest), min(110, longest) + 1, len(theirs)).tolist()
    ]
    for classifier in ways.values():
        classifier.warm_up(10)
    rows = []
    for kind, encoded, callers in (
        ("the texts", theirs, 1),
        ("the texts", theirs, 8),
        ("the texts", theirs, 32),
        ("60 to 110 tokens alike", long, 32),
    ):
        turns = [
            {
                way: asyncio.run(_closed_loop(classifier, encoded, callers, 0, seconds / rounds))
                for way, classifier in ways.items()
            }
            for _ in range(rounds)
        ]
        for way in ways:
            rate, median, tail = zip(*(turn[way] for turn in turns), strict=True)
            relative = np.array(rate) / np.array([turn["a row each"][0] for turn in turns])
            rows.append(
                [
                    kind,
                    str(callers),
                    way,
                    f"{np.median(rate):.0f}",
                    spread(relative),
                    f"{np.median(median):.1f}",
                    f"{np.median(tail):.1f}",
                ]
            )
    return (
        Table(
            "Shared rows or a row each",
            ("traffic", "callers", "texts have", "texts/s", "by a row each", "p50, ms", "p99, ms"),
            rows,
            LOOP,
        ),
        [],
    )


def _cut_to(tokens: int, texts: Sequence[Encoded]) -> Encoded:
    """A text of so many tokens, made of theirs."""
    ids = list(
        itertools.islice(
            (one for text in itertools.cycle(texts) for one in text.ids[1:-1]), tokens - 2
        )
    )
    return Encoded([texts[0].ids[0], *ids, texts[0].ids[-1]], [0] * tokens, False)


# Lengths: what an engine keeps for every shape.


def lengths(each: Subject, rounds: int) -> tuple[Table, list[Target]]:
    top = each.artifact.manifest.max_tokens
    grid = Shapes(top).lengths
    kinds = {
        "every length": list(range(2, top + 1)),
        "the grid's": [
            next(length for length in grid if length >= tokens) for tokens in range(2, top + 1)
        ],
    }
    rows = []
    for name, each_length in kinds.items():
        classifier = _classifier(each)
        before, passes = _resident(), []
        for _ in range(1 + rounds):
            began = time.perf_counter()
            for length in each_length:
                classifier.runtime.start(_inputs(classifier, 4, length))()
            passes.append(time.perf_counter() - began)
        rows.append(
            [
                name,
                str(len(set(each_length))),
                f"{1000 * passes[0] / len(each_length):.2f}",
                f"{1000 * min(passes[1:]) / len(each_length):.2f}",
                f"{(_resident() - before) / 2**20:.0f}",
            ]
        )
    return (
        Table(
            "Exact lengths or the grid's",
            ("lengths", "shapes", "first run, ms", "later runs, ms", "memory kept, MiB"),
            rows,
            f"Batches of 4, one for every number of tokens from 2 to {top}.",
        ),
        [],
    )


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Streams: all processors on one batch, or a batch for each.


def streams(each: Subject, rounds: int) -> tuple[Table, list[Target]]:
    threads = cpus.usable()
    variant = each.artifact.manifest.variants[each.variants[-1]]
    options = {
        "INFERENCE_PRECISION_HINT": ov.Type.bf16 if variant.precision == "bf16" else ov.Type.f32,
        "INFERENCE_NUM_THREADS": threads,
    }
    path = each.artifact.path(variant.files[0])
    # LATENCY would lay the streams out by itself.
    models = {
        count: ov.Core().compile_model(path, "CPU", options | {"NUM_STREAMS": count})
        for count in sorted({1, threads})
    }
    classifier = _classifier(each)
    rows = []
    for size, length in ((1, 32), (8, 32), (8, 128)):
        given = _inputs(classifier, size, length)
        turns = [
            {count: _stream_seconds(model, given, count) for count, model in models.items()}
            for _ in range(1 + rounds)
        ][1:]
        seen = {count: [turn[count] for turn in turns] for count in models}
        for count, times in seen.items():
            rate, took = ([one[i] for one in times] for i in (0, 1))
            relative = np.array(rate) / np.array([one[0] for one in seen[1]])
            rows.append(
                [
                    f"{size} × {length}",
                    str(count),
                    f"{np.median(took) * 1000:.1f}",
                    f"{size * np.median(rate):.0f}",
                    spread(relative),
                ]
            )
    return (
        Table(
            "Streams",
            ("batch × length", "streams", "a batch takes, ms", "texts/s", "by one stream"),
            rows,
            f"{threads} thread(s) together; as many batches at once as streams.",
        ),
        [],
    )


def _stream_seconds(model: Any, given: dict[str, np.ndarray], count: int) -> tuple[float, float]:
    """(batches a second, seconds a batch) with `count` requests under way at once."""
    requests = [model.create_infer_request() for _ in range(count)]
    times: list[float] = []

    def work(request: Any) -> None:
        for _ in range(6):
            began = time.perf_counter()
            request.infer(given)
            times.append(time.perf_counter() - began)

    workers = [threading.Thread(target=work, args=(request,)) for request in requests]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(times) / (time.perf_counter() - began), float(np.median(times))


# Waiting: greedy, or for more.


class Patient(Batcher):
    """Waits so long for a full batch once something waits."""

    patience_s = 0.0

    def _next_batch(self, wait: bool) -> Any:
        if self.patience_s and wait:
            with self._changed:
                while not self.queue and not self._closing:
                    self._changed.wait()
                give_up = time.monotonic() + self.patience_s
                while (
                    len(self.queue) < self.max_batch_size
                    and not self._closing
                    and (left := give_up - time.monotonic()) > 0
                ):
                    self._changed.wait(left)
        return super()._next_batch(wait)


def waiting(
    each: Subject, texts: Sequence[str], rounds: int, seconds: float
) -> tuple[Table, list[Target]]:
    classifier = _classifier(each)
    encoded = [classifier.encode(text) for text in texts]
    classifier.warm_up(10)
    rows = []
    for callers in (1, 8, 32):
        seen: dict[int, list[tuple[float, float, float]]] = {wait: [] for wait in WAITS_MS}
        for _ in range(rounds):
            for wait in WAITS_MS:
                seen[wait].append(
                    asyncio.run(
                        _closed_loop(classifier, encoded, callers, wait / 1000, seconds / rounds)
                    )
                )
        for wait, found in seen.items():
            rate, median, tail = zip(*found, strict=True)
            relative = np.array(rate) / np.array([one[0] for one in seen[0]])
            rows.append(
                [
                    str(callers),
                    f"{wait} ms" if wait else "none",
                    f"{np.median(rate):.0f}",
                    spread(relative),
                    f"{np.median(median):.1f}",
                    f"{np.median(tail):.1f}",
                ]
            )
    return (
        Table(
            "Waiting for a fuller batch",
            ("callers", "wait", "texts/s", "by no wait", "p50, ms", "p99, ms"),
            rows,
            LOOP,
        ),
        [],
    )


async def _closed_loop(
    classifier: Classifier,
    encoded: Sequence[Encoded],
    callers: int,
    patience_s: float,
    seconds: float,
) -> tuple[float, float, float]:
    batcher = Patient(
        {"m": classifier},
        classifier.shapes.max_batch_size,
        TOKENS,
        batch_size=classifier.shapes.batch_size,
        on_batch=_ignore,
    )
    batcher.patience_s = patience_s
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
    return (
        len(times) / seconds,
        float(np.median(times)) * 1000,
        float(np.percentile(times, 99)) * 1000,
    )


def _ignore(batch: Batch) -> None:
    """Nobody counts here."""


def _classifier(each: Subject) -> Classifier:
    return Classifier(
        each.artifact,
        load(each.artifact, Choice(each.variants[-1], "openvino", "benchmark"), cpus.usable()),
    )


def _inputs(classifier: Classifier, batch: int, length: int) -> dict[str, np.ndarray]:
    arrays = {
        "input_ids": np.full((batch, length), 7),
        "attention_mask": np.ones((batch, length), np.int64),
        "token_type_ids": np.zeros((batch, length), np.int64),
    }
    return {name: arrays[name] for name in classifier.manifest.inputs}
