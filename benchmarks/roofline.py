"""
What share of the processor's peak does the engine reach?

    python -m benchmarks roofline [--short] [--out FILE]

The peak is the fastest large matrix product of the same run, by oneDNN through torch and by
OpenVINO itself, for each precision. The engine's rate is the model's operations by the time of a
batch. Both run in turns, so that noise meets both.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
import torch

from benchmarks.harness.findings import Findings, Table, Target, markdown, spread, write
from benchmarks.harness.flops import flops
from benchmarks.harness.models_under_test import ModelUnderTest, batch_shapes, model_under_test
from command import Parser
from service.host import cpus
from service.runtimes.auto import Choice, load
from service.runtimes.openvino import OpenVinoRuntime, compiled

# M × K × N: the products of BERT-base's feed-forward layers, with 8 and 16 texts of 128 tokens.
PRODUCTS = ((1024, 768, 3072), (1024, 3072, 768), (2048, 768, 3072))
LEAST_SHARE = {"f32": None, "bf16": 0.85, "i8": 0.70}
"""Target of each precision: the engine's share of the peak at TARGET_SHAPE."""
TARGET_SHAPE = (8, 128)

Call = Callable[[], object]


def main(arguments: Sequence[str]) -> int:
    """Measure the engine against the peak and print the tables."""
    parser = Parser(
        prog="python -m benchmarks roofline",
        description="Measure the engine against the processor's matrix products.",
    )
    parser.add_argument("--short", action="store_true", help="fewer rounds and shapes")
    parser.add_argument(
        "--size",
        choices=("base", "mini", "tiny"),
        default="base",
        help="the model (default: BERT-base's size, random weights)",
    )
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    options = parser.parse_args(arguments)
    findings = measure(
        options.size, rounds=5 if options.short else 15, shapes=batch_shapes(options.short)
    )
    print(markdown(findings))
    if options.out is not None:
        write(options.out, "python -m benchmarks roofline", [findings])
    return 0


@dataclass(frozen=True)
class Timing:
    """Measurements of one variant, by round."""

    peak: np.ndarray
    """Operations per second of the fastest matrix product."""
    batches: dict[tuple[int, int], np.ndarray]
    """Seconds of a batch by its shape (texts, tokens)."""


def measure(size: str, rounds: int, shapes: Sequence[tuple[int, int]]) -> Findings:
    """Return the engine's share of the peak for each variant and shape, over `rounds` rounds."""
    threads = cpus.usable()
    torch.set_num_threads(threads)
    model = model_under_test(size)
    config = json.loads((model.checkpoint / "config.json").read_text())
    rows, profiles, targets, values = [], [], [], {}
    for name in model.variants:
        precision = model.artifact.manifest.variants[name].precision
        engine = load(model.artifact, Choice(name, "openvino", "benchmark"), threads)
        assert isinstance(engine, OpenVinoRuntime)
        profiles += _profile(model, name, engine.unquantized_precision or engine.precision, threads)
        timing = _time(engine, model.artifact.manifest.inputs, precision, rounds, shapes)
        for shape, batch_s in timing.batches.items():
            rate = flops(model.artifact, config, *shape) / batch_s
            share = rate / timing.peak
            values[f"{name} {shape[0]}x{shape[1]}"] = {
                "ops": rate.tolist(),
                "peak": timing.peak.tolist(),
            }
            rows.append(
                [
                    name,
                    f"{shape[0]} × {shape[1]}",
                    f"{np.median(batch_s) * 1000:.1f}",
                    f"{np.median(rate) / 1e9:,.0f}",
                    f"{np.median(timing.peak) / 1e9:,.0f}",
                    spread(share),
                ]
            )
            limit = LEAST_SHARE[precision]
            if shape == TARGET_SHAPE and limit is not None:
                targets.append(_target(name, limit, float(np.median(share))))
    for absent in LEAST_SHARE.keys() - cpus.native_precisions():
        targets.append(_target(absent, LEAST_SHARE[absent], None))
    return Findings(
        "roofline",
        f"What share of the processor's matrix products does the engine reach ({size}, {threads}"
        " thread(s))?",
        [_share_table(rows), _profile_table(profiles)],
        targets,
        values,
    )


def _target(name: str, limit: float | None, share: float | None) -> Target:
    """Return a variant's target; a share of None means the processor lacks the instructions."""
    measured = "this processor has no instructions for it" if share is None else f"{share:.2f}"
    holds = None if share is None or limit is None else share >= limit
    return Target(f"{name}: engine by peak at 8 × 128", f"≥ {limit:.2f}", measured, holds)


def _share_table(rows: Sequence[Sequence[str]]) -> Table:
    columns = (
        "variant",
        "batch × length",
        "ms",
        "engine, Gop/s",
        "peak, Gop/s",
        "engine by peak",
    )
    note = (
        "Operations are those of the model's matrices, two for a multiply-add. Normalisation,"
        " softmax and GELU are not counted; their time is."
    )
    return Table("", columns, rows, note)


def _profile_table(rows: Sequence[Sequence[str]]) -> Table:
    columns = ("variant", "kind of operation", "kernel", "how many", "of the time")
    note = (
        "As OpenVINO counts it (PERF_COUNT), the median of 10 batches, without kinds that take less"
        " than 1 %. GELU, additions and quantisation are mostly in the products' own kernels."
    )
    return Table("Where a batch of 8 × 128 spends its time", columns, rows, note)


def _time(
    engine: OpenVinoRuntime,
    inputs: Sequence[str],
    precision: str,
    rounds: int,
    shapes: Sequence[tuple[int, int]],
) -> Timing:
    """Time the matrix products of a precision and the engine's batches, in turns."""
    peaks = products(precision, cpus.usable())
    batches = {shape: _batch(engine, inputs, *shape) for shape in shapes}
    calls = [*(call for call, _ in peaks), *batches.values()]
    times = np.zeros((rounds + 1, len(calls)))
    for number in range(rounds + 1):
        for i, call in enumerate(calls):
            times[number, i] = _seconds(call)
    # The first round fills caches and chooses kernels.
    times = times[1:]
    peak = np.max([work / times[:, i] for i, (_, work) in enumerate(peaks)], axis=0)
    return Timing(peak, {shape: times[:, len(peaks) + i] for i, shape in enumerate(shapes)})


def _profile(model: ModelUnderTest, variant: str, precision: str, threads: int) -> list[list[str]]:
    """Return a row for each kind of operation with its share of a batch's time, largest first."""
    graph = model.artifact.path(model.artifact.manifest.variants[variant].files[0])
    engine = compiled(graph, precision, threads, {"PERF_COUNT": True})
    request, rng = engine.create_infer_request(), np.random.default_rng(0)
    inputs = {}
    for port in engine.inputs:
        inputs[port.any_name] = (
            rng.integers(5, 1000, TARGET_SHAPE)
            if port.any_name == "input_ids"
            else np.ones(TARGET_SHAPE, np.int64)
        )
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    counts: dict[tuple[str, str], int] = {}
    for number in range(12):
        request.infer(inputs)
        if number < 2:  # warm-up
            continue
        batch_s: dict[tuple[str, str], float] = defaultdict(float)
        counts = defaultdict(int)
        for node in request.profiling_info:
            kind = (node.node_type, node.exec_type)
            batch_s[kind] += node.real_time.total_seconds()
            counts[kind] += node.real_time.total_seconds() > 0
        for kind, taken in batch_s.items():
            seconds[kind].append(taken)
    medians = {kind: float(np.median(taken)) for kind, taken in seconds.items()}
    whole = sum(medians.values())
    return [
        [variant, kind, kernel, str(counts[kind, kernel]), f"{taken / whole:.0%}"]
        for (kind, kernel), taken in sorted(medians.items(), key=lambda item: -item[1])
        if taken >= 0.01 * whole
    ]


def products(precision: str, threads: int) -> list[tuple[Call, int]]:
    """Return large matrix products in a precision, each with its number of operations."""
    calls: list[tuple[Call, int]] = []
    for m, k, n in PRODUCTS:
        torch_product = _torch_int8(m, k, n) if precision == "i8" else _torch(m, k, n, precision)
        for call in (torch_product, _openvino_product(m, k, n, precision, threads)):
            calls.append((call, 2 * m * k * n))
    return calls


def _torch(m: int, k: int, n: int, precision: str) -> Call:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    left, right = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    return partial(torch.mm, left, right, out=torch.empty(m, n, dtype=dtype))


def _torch_int8(m: int, k: int, n: int) -> Call:
    torch.backends.quantized.engine = (
        "onednn" if "onednn" in torch.backends.quantized.supported_engines else "fbgemm"
    )
    weights = torch.quantize_per_channel(
        torch.randn(n, k), torch.full((n,), 0.02), torch.zeros(n, dtype=torch.long), 0, torch.qint8
    )
    packed = torch.ops.quantized.linear_prepack(weights, None)
    left = torch.quantize_per_tensor(torch.randn(m, k), 0.02, 128, torch.quint8)
    return lambda: torch.ops.quantized.linear(left, packed, 0.1, 128)


def _openvino_product(m: int, k: int, n: int, precision: str, threads: int) -> Call:
    """Return the same product as a model of one layer, with its input in 8 bits for `i8`."""
    from openvino import opset13 as ops

    x = ops.parameter([m, k], np.float32)
    left, weights = x, np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    right = ops.constant(weights)
    if precision == "i8":
        low, high = (ops.constant(np.float32(value)) for value in (-4, 4))
        left = ops.fake_quantize(x, low, high, low, high, 256)
        right = ops.fake_quantize(
            right,
            *(ops.constant(np.full((n, 1), value, np.float32)) for value in (-4, 4, -4, 4)),
            255,
        )
    model = ov.Model([ops.matmul(left, right, False, True)], [x])
    request = compiled(
        model, "bf16" if precision == "bf16" else "f32", threads
    ).create_infer_request()
    request.set_input_tensor(
        0, ov.Tensor(np.random.default_rng(1).standard_normal((m, k)).astype(np.float32))
    )
    return lambda: request.infer()


def _batch(engine: OpenVinoRuntime, names: Sequence[str], batch: int, length: int) -> Call:
    rng = np.random.default_rng(0)
    arrays = {
        "input_ids": rng.integers(5, 1000, (batch, length)),
        "attention_mask": np.ones((batch, length), np.int64),
        "token_type_ids": np.zeros((batch, length), np.int64),
    }
    inputs = {name: arrays[name] for name in names}
    return lambda: engine.start(inputs)()


def _seconds(call: Call) -> float:
    """Return the shortest of three runs, because noise of the machine only adds time."""
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
