"""
The engine alone: is it the GPU, is it right, how long does a batch take, how many texts a second,
and which shapes are worth it?
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.gpu.rig import VARIANT, Rig
from benchmarks.harness.findings import Findings, Table, Target, at_least, at_most
from service.batching.shapes import Grid, Shapes, write_grid
from service.classifier import Encoded
from service.host import gpus
from service.runtimes import Inputs
from service.runtimes.onnxruntime import OnnxRuntime

BATCHES, LENGTHS = (1, 8, 32, 128), (32, 128, 384, 512)
# Different kernels are chosen for small and large ones.
COMPARED = ((1, 8), (3, 16), (4, 32), (2, 64), (32, 128), (8, 384), (4, 512))
# Of what the logits differ by among texts. Wrong lengths or stale inputs change more than rounding
# to sixteen bits does.
TOLERANCE = 0.05
# Enough for some dozens of the largest batches.
OFFLINE_TEXTS = 8192
# A batch size or token more is worth its graph if it brings this much.
WORTH = 0.05


def providers(rig: Rig) -> Findings:
    """Which provider is in use, and how far its logits are from the CPU's, on the same graph."""
    engine, artifact = rig.engine(), rig.artifacts["bert"]
    exact = OnnxRuntime(artifact.path(artifact.manifest.variants[VARIANT].files[0]), "f16", 4)
    shapes = [
        (rows, length)
        for rows, length in COMPARED
        if length <= rig.artifacts["bert"].manifest.max_tokens
        and rows <= engine.grid.batch_sizes[-1]
    ]
    differences, spreads = [], []
    for rows, length in shapes:
        # A captured graph that kept something of what it was captured with, such as the lengths,
        # shows when other rows come, and the first again.
        for seed in (0, 1, 0):
            given = inputs(rig, rows, length, padded=True, seed=seed)
            expected = exact.start(given)()
            differences.append(float(np.abs(engine.start(given)() - expected).max()))
            spreads.append(float(np.ptp(expected, axis=0).max()))
    worst, spread = max(differences), max(spreads)
    in_use = engine._session.get_providers()[0]
    rows_ = [
        [in_use, engine.device, "yes" if engine.captures else "no", f"{worst:.1e}", f"{spread:.1e}"]
    ]
    told = ", ".join(f"{rows} × {length}" for rows, length in shapes)
    return Findings(
        "providers",
        "Is it the GPU that computes, and does it compute what the CPU computes?",
        [
            Table(
                "",
                (
                    "provider in use",
                    "device",
                    "CUDA graphs",
                    "largest difference of a logit",
                    "logits differ among texts by",
                ),
                rows_,
                f"The same fp16 graph on both; batches of {told}, each with rows of some lengths,"
                " of others, and of the first again.",
            )
        ],
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
                None if rig.rehearsal else in_use == "CUDAExecutionProvider",
            ),
        ],
        {"shapes": shapes, "differences": differences, "spreads": spreads, "provider": in_use},
    )


def latency(rig: Rig) -> Findings:
    """Milliseconds of a batch, with the copies to and from the GPU and without."""
    engine = rig.engine()
    rows, values = [], {}
    for length in _lengths(rig):
        for size in BATCHES:
            if size not in engine.grid.batch_sizes or size * length > max(
                engine.grid.max_batch_tokens, 65_536
            ):
                continue
            given = inputs(rig, size, length)
            whole = seconds(lambda given=given: engine.start(given)())  # type: ignore[misc]
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
            asked,
            " ms",
            3,
        )
        for shape, asked in (("1x128", 0.6), ("32x128", 2.2))
        if shape in values and not rig.rehearsal
    ]
    return Findings(
        "engine",
        f"How long does a batch take ({rig.size})?",
        [
            Table(
                "",
                (
                    "batch × length",
                    "graph: median, ms",
                    "p99, ms",
                    "with copies: median, ms",
                    "p99, ms",
                    "texts/s",
                ),
                rows,
                "Beside it, published and not measured here: TensorRT's demo of BERT-base fp16 on"
                " an A100-40G at length 128, without copies, 0.67 ms for 1, 1.38 for 8, 4.10 for"
                " 32, 16.1 for 128; AITemplate on an A100 0.78, 1.43, 4.17, 16.0, PyTorch 1.12"
                " eager 8.02, 8.12, 9.11, 29.4.",
            )
        ],
        targets,
        values,
    )


def offline(rig: Rig) -> Findings:
    """Texts a second of the engine alone: real lengths sorted, in the largest batches; and all of
    length 128.
    """
    classifier = rig.classifier()
    classifier.warm_up(0)
    once = [classifier.encode(text) for text in rig.texts]
    encoded = sorted(
        once * math.ceil((64 if rig.rehearsal else OFFLINE_TEXTS) / len(once)),
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
    even = min(128, rig.artifacts["bert"].manifest.max_tokens)
    full = [Encoded([5] * even, [0] * even, False)] * shapes.max_batch_size
    found = {
        "real lengths": [
            texts / one for one in _rounds(rig, lambda: pipelined(classifier.start, batches))
        ],
        f"length {even}": [
            8 * len(full) / one
            for one in _rounds(rig, lambda: pipelined(classifier.start, [full] * 8))
        ],
    }
    rows = [
        [name, f"{np.median(values):,.0f}", f"{min(values):,.0f} – {max(values):,.0f}"]
        for name, values in found.items()
    ]
    targets = (
        []
        if rig.rehearsal
        else [
            at_least(
                f"texts/s at length {even}", float(np.median(found[f"length {even}"])), 18_000, 0
            )
        ]
    )
    return Findings(
        "offline",
        "How many texts a second can the engine classify?",
        [
            Table(
                "",
                ("texts", "texts/s", "least – most"),
                rows,
                "Tokens ready; two batches under way.",
            )
        ],
        targets,
        found,
    )


def calibrate(rig: Rig, out: Path) -> Findings:
    """Measures every shape of the grid, keeps those that are worth a captured graph, and writes
    them to `out`.
    """
    engine = rig.engine()
    shapes = Shapes(rig.artifacts["bert"].manifest.max_tokens, grid=engine.grid)
    measured = []
    for size, length in shapes.likely_first():
        engine.start(inputs(rig, size, length))()
        measured.append(
            (size, length, float(np.median(engine.replayed(size, length, at_least=20)) * 1e3))
        )
    kept = keep(measured, engine.grid)
    device = "CPU" if rig.rehearsal else gpus.visible()[0].name
    write_grid(out, device, kept, measured)
    rows = [
        [
            ", ".join(map(str, kept.batch_sizes)),
            ", ".join(map(str, kept.lengths)),
            f"{kept.max_batch_tokens:,}",
        ]
    ]
    return Findings(
        "calibrate",
        f"Which shapes are worth a graph on {device}? Written to {out}.",
        [Table("", ("batch sizes", "lengths", "tokens a batch"), rows)],
        (),
        {"measured": measured},
    )


def keep(measured: list[tuple[int, int, float]], grid: Grid) -> Grid:
    """The shapes worth a graph of those measured, (batch size, length, ms).

    A length is dropped where the next one takes as long at every size, a batch size where the next
    one does at every length; the token budget is the least number of tokens a batch at which no
    larger batch computes more of them a second.
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

    def worth(
        ones: list[int], pair: Callable[[int, int], tuple[int, int]], others: list[int]
    ) -> tuple[int, ...]:
        kept = [ones[-1]]
        for one in reversed(ones[:-1]):
            both = [
                (times[pair(one, other)], times[pair(kept[0], other)])
                for other in others
                if pair(one, other) in times and pair(kept[0], other) in times
            ]
            if not both or any(less < (1 - WORTH) * more for less, more in both):
                kept.insert(0, one)
        return tuple(kept)

    return Grid(
        worth(sizes, lambda size, length: (size, length), lengths),
        (),
        grid.last_step,
        budget,
        padded_rows=True,
        all_warm=True,
        lengths=worth(lengths, lambda length, size: (size, length), sizes),
    )


def inputs(rig: Rig, rows: int, length: int, padded: bool = False, seed: int = 0) -> Inputs:
    """A batch of random tokens; `padded`: of random lengths, one of them whole."""
    draw = np.random.default_rng((rows, length, seed))
    ids = draw.integers(5, 1000, (rows, length))
    tokens = (
        np.append(draw.integers(3, length + 1, rows - 1), length)
        if padded
        else np.full(rows, length)
    )
    mask = (np.arange(length) < tokens[:, None]).astype(np.int64)
    arrays = {
        "input_ids": np.where(mask == 1, ids, 0),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
    }
    return {name: arrays[name] for name in rig.artifacts["bert"].manifest.inputs}


def seconds(call: Callable[[], object], runs: int = 200, at_most_s: float = 1.0) -> np.ndarray:
    """How long each of some runs took, after a few that do not count; fewer of them if they take
    too long.
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


def pipelined(
    start: Callable[[list[Encoded]], Callable[[], object]], batches: list[list[Encoded]]
) -> None:
    """Runs batches as the service does: the next one is packed while one computes."""
    waiting: Callable[[], object] | None = None
    for batch in batches:
        begun = start(batch)
        if waiting is not None:
            waiting()
        waiting = begun
    if waiting is not None:
        waiting()


def _rounds(rig: Rig, call: Callable[[], object]) -> list[float]:
    taken = []
    for _ in range(2 if rig.rehearsal else 6):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return taken[1:]


def _lengths(rig: Rig) -> list[int]:
    most = rig.artifacts["bert"].manifest.max_tokens
    return [length for length in LENGTHS if length <= most]
