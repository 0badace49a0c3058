"""
The engine alone: its provider, its numerics, the time of a batch, its throughput, and its grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.gpu.gpu_setup import VARIANT, GpuSetup
from benchmarks.harness.findings import Findings, Table, Target, at_least, at_most
from service.batching.shapes import Grid, Shapes, write_grid
from service.classifier import Encoded
from service.host import gpus
from service.runtimes import Inputs
from service.runtimes.onnxruntime import OnnxRuntime

BATCHES, LENGTHS = (1, 8, 32, 128), (32, 128, 384, 512)
COMPARED = ((1, 8), (3, 16), (4, 32), (2, 64), (32, 128), (8, 384), (4, 512))
"""Shapes (texts, tokens) compared with the CPU: small and large ones run different kernels."""
TOLERANCE = 0.05
"""Largest error of a logit, by the spread of logits among texts.

Wrong lengths or stale inputs change more than rounding to sixteen bits does.
"""
OFFLINE_TEXTS = 8192
"""Texts of the throughput stage: some dozens of the largest batches."""
WORTH = 0.05
"""Least gain in time for which a batch size or length gets a graph of its own."""


def providers(setup: GpuSetup) -> Findings:
    """Return the provider in use, and the distance of its logits from the CPU's on one graph."""
    engine, artifact = setup.engine(), setup.artifacts["bert"]
    exact = OnnxRuntime(artifact.path(artifact.manifest.variants[VARIANT].files[0]), "f16", 4)
    shapes = [
        (rows, length)
        for rows, length in COMPARED
        if length <= setup.artifacts["bert"].manifest.max_tokens
        and rows <= engine.grid.batch_sizes[-1]
    ]
    differences, spreads = [], []
    for rows, length in shapes:
        # Other rows, and then the first again, reveal a captured graph that still uses values of
        # its capture, such as the lengths.
        for seed in (0, 1, 0):
            batch = inputs(setup, rows, length, padded=True, seed=seed)
            expected = exact.start(batch)()
            differences.append(float(np.abs(engine.start(batch)() - expected).max()))
            spreads.append(float(np.ptp(expected, axis=0).max()))
    worst, spread = max(differences), max(spreads)
    in_use = engine._session.get_providers()[0]
    captures = "yes" if engine.captures else "no"
    columns = (
        "provider in use",
        "device",
        "CUDA graphs",
        "largest difference of a logit",
        "logits differ among texts by",
    )
    cells = [in_use, engine.device, captures, f"{worst:.1e}", f"{spread:.1e}"]
    names = ", ".join(f"{rows} × {length}" for rows, length in shapes)
    note = (
        f"The same fp16 graph on both; batches of {names}, each with rows of some lengths, of other"
        " lengths, and of the first again."
    )
    return Findings(
        "providers",
        "Does the GPU compute, and does it compute what the CPU computes?",
        [Table("", columns, [cells], note)],
        [
            at_most(
                "largest difference of a logit from the CPU's, by how much they differ among texts",
                worst / spread,
                TOLERANCE,
                digits=4,
            ),
            Target(
                "provider",
                "CUDAExecutionProvider",
                in_use,
                None if setup.dry_run else in_use == "CUDAExecutionProvider",
            ),
        ],
        {"shapes": shapes, "differences": differences, "spreads": spreads, "provider": in_use},
    )


def latency(setup: GpuSetup) -> Findings:
    """Return the milliseconds of a batch, with and without the copies to and from the GPU."""
    engine = setup.engine()
    rows, values = [], {}
    for length in _lengths(setup):
        for size in BATCHES:
            if size not in engine.grid.batch_sizes or size * length > max(
                engine.grid.max_batch_tokens, 65_536
            ):
                continue
            batch = inputs(setup, size, length)
            whole = seconds(lambda batch=batch: engine.start(batch)())  # type: ignore[misc]
            alone = np.array(engine.replayed(size, length, at_least=3, seconds=0.5)[1:])
            values[f"{size}x{length}"] = {
                "whole_ms": (whole * 1e3).tolist(),
                "replay_ms": (alone * 1e3).tolist(),
            }
            rows.append(
                [
                    f"{size} × {length}",
                    f"{np.median(alone) * 1e3:.3f}",
                    f"{np.percentile(alone, 99) * 1e3:.3f}",
                    f"{np.median(whole) * 1e3:.3f}",
                    f"{np.percentile(whole, 99) * 1e3:.3f}",
                    f"{size / np.median(whole):,.0f}",
                ]
            )
    targets = [
        at_most(
            f"{shape}: engine by CUDA graph",
            float(np.median(values[shape]["replay_ms"])),
            limit,
            " ms",
            3,
        )
        for shape, limit in (("1x128", 0.6), ("32x128", 2.2))
        if shape in values and not setup.dry_run
    ]
    columns = (
        "batch × length",
        "graph: median, ms",
        "p99, ms",
        "with copies: median, ms",
        "p99, ms",
        "texts/s",
    )
    note = (
        "For comparison, published and not measured here: TensorRT's demo of BERT-base fp16 on an"
        " A100-40G at length 128, without copies, 0.67 ms for 1, 1.38 for 8, 4.10 for 32, 16.1 for"
        " 128; AITemplate on an A100 0.78, 1.43, 4.17, 16.0, PyTorch 1.12 eager 8.02, 8.12, 9.11,"
        " 29.4."
    )
    return Findings(
        "engine",
        f"How long does a batch take ({setup.size})?",
        [Table("", columns, rows, note)],
        targets,
        values,
    )


def offline(setup: GpuSetup) -> Findings:
    """Return the texts per second of the engine alone, tokens ready.

    Texts are of real lengths, sorted, in the largest batches; and then all of length 128.
    """
    classifier = setup.classifier()
    classifier.warm_up(0)
    once = [classifier.encode(text) for text in setup.texts]
    encoded = sorted(
        once * math.ceil((64 if setup.dry_run else OFFLINE_TEXTS) / len(once)),
        key=lambda item: item.tokens,
    )
    batches, shapes = [], classifier.shapes
    while encoded:
        longest = shapes.length(encoded[-1].tokens)
        size = max(
            (rows for rows in shapes.batch_sizes if rows * longest <= shapes.max_batch_tokens),
            default=1,
        )
        batches.append(encoded[-size:])
        del encoded[-size:]
    texts = sum(map(len, batches))
    even = min(128, setup.artifacts["bert"].manifest.max_tokens)
    full = [Encoded([5] * even, [0] * even, False)] * shapes.max_batch_size
    real_s = _rounds(setup, lambda: run_pipelined(classifier.start, batches))
    even_s = _rounds(setup, lambda: run_pipelined(classifier.start, [full] * 8))
    rates = {
        "real lengths": [texts / taken for taken in real_s],
        f"length {even}": [8 * len(full) / taken for taken in even_s],
    }
    rows = [
        [name, f"{np.median(values):,.0f}", f"{min(values):,.0f} – {max(values):,.0f}"]
        for name, values in rates.items()
    ]
    targets = []
    if not setup.dry_run:
        median = float(np.median(rates[f"length {even}"]))
        targets.append(at_least(f"texts/s at length {even}", median, 18_000, 0))
    columns = ("texts", "texts/s", "least – most")
    return Findings(
        "offline",
        "How many texts per second can the engine classify?",
        [Table("", columns, rows, "Tokens ready; two batches in flight.")],
        targets,
        rates,
    )


def calibrate(setup: GpuSetup, out: Path) -> Findings:
    """Measure every shape of the grid and write those that are worth a captured graph to `out`."""
    engine = setup.engine()
    shapes = Shapes(setup.artifacts["bert"].manifest.max_tokens, grid=engine.grid)
    measured = []
    for size, length in shapes.by_work():
        engine.start(inputs(setup, size, length))()
        measured.append(
            (size, length, float(np.median(engine.replayed(size, length, at_least=20)) * 1e3))
        )
    grid = worthwhile_grid(measured, engine.grid)
    device = "CPU" if setup.dry_run else gpus.visible()[0].name
    write_grid(out, device, grid, measured)
    rows = [
        [
            ", ".join(map(str, grid.batch_sizes)),
            ", ".join(map(str, grid.lengths)),
            f"{grid.max_batch_tokens:,}",
        ]
    ]
    return Findings(
        "calibrate",
        f"Which shapes are worth a graph on {device}? Written to {out}.",
        [Table("", ("batch sizes", "lengths", "tokens a batch"), rows)],
        (),
        {"measured": measured},
    )


def worthwhile_grid(measured: list[tuple[int, int, float]], grid: Grid) -> Grid:
    """Return the grid of the shapes that are worth a graph, of those measured.

    `measured` has (batch size, length, milliseconds). A length is dropped where the next one takes
    as long at every size, a batch size where the next one does at every length. The token budget is
    the fewest tokens per batch at which no larger batch computes more of them per second.
    """
    times = {(size, length): ms for size, length, ms in measured}
    sizes, lengths = (
        sorted({size for size, _, _ in measured}),
        sorted({length for _, length, _ in measured}),
    )
    best = max(size * length / ms for size, length, ms in measured)
    budget = min(
        size * length for size, length, ms in measured if size * length / ms >= (1 - WORTH) * best
    )

    def worthwhile(
        values: list[int], shape: Callable[[int, int], tuple[int, int]], others: list[int]
    ) -> tuple[int, ...]:
        """Return the values along one axis that are faster than the next one that is kept."""
        chosen = [values[-1]]
        for value in reversed(values[:-1]):
            pairs = [
                (times[shape(value, other)], times[shape(chosen[0], other)])
                for other in others
                if shape(value, other) in times and shape(chosen[0], other) in times
            ]
            if not pairs or any(less < (1 - WORTH) * more for less, more in pairs):
                chosen.insert(0, value)
        return tuple(chosen)

    return Grid(
        worthwhile(sizes, lambda size, length: (size, length), lengths),
        (),
        grid.last_step,
        budget,
        padded_rows=True,
        warm_up_all=True,
        lengths=worthwhile(lengths, lambda length, size: (size, length), sizes),
    )


def inputs(setup: GpuSetup, rows: int, length: int, padded: bool = False, seed: int = 0) -> Inputs:
    """Return a batch of random tokens; if `padded`, of random lengths, one of them full."""
    rng = np.random.default_rng((rows, length, seed))
    ids = rng.integers(5, 1000, (rows, length))
    tokens = (
        np.append(rng.integers(3, length + 1, rows - 1), length)
        if padded
        else np.full(rows, length)
    )
    mask = (np.arange(length) < tokens[:, None]).astype(np.int64)
    arrays = {
        "input_ids": np.where(mask == 1, ids, 0),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
    }
    return {name: arrays[name] for name in setup.artifacts["bert"].manifest.inputs}


def seconds(call: Callable[[], object], runs: int = 200, at_most_s: float = 1.0) -> np.ndarray:
    """Return the seconds of each of `runs` runs, after five runs as a warm-up.

    There are fewer, but at least three, if they take more than `at_most_s` seconds together.
    """
    for _ in range(5):
        call()
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < runs and (len(taken) < 3 or time.perf_counter() - began < at_most_s):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return np.array(taken)


def run_pipelined(
    start: Callable[[list[Encoded]], Callable[[], object]], batches: list[list[Encoded]]
) -> None:
    """Run batches as the service does: one is packed while the one before computes."""
    waiting: Callable[[], object] | None = None
    for batch in batches:
        finish = start(batch)
        if waiting is not None:
            waiting()
        waiting = finish
    if waiting is not None:
        waiting()


def _rounds(setup: GpuSetup, call: Callable[[], object]) -> list[float]:
    """Return the seconds of each round; the first one is a warm-up and is dropped."""
    taken = []
    for _ in range(2 if setup.dry_run else 6):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return taken[1:]


def _lengths(setup: GpuSetup) -> list[int]:
    most = setup.artifacts["bert"].manifest.max_tokens
    return [length for length in LENGTHS if length <= most]
