"""
How much of what the processor can multiply does the engine reach?

    python -m benchmarks roofline [--short] [--out FILE]

The peak is the best large matrix product found in the same run, by oneDNN through torch and by
OpenVINO itself, for each precision; the engine's rate is the model's operations by the time of a
batch. Both in turns, so that noise meets both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
import torch

from benchmarks.harness.findings import Findings, Table, Target, markdown, spread, write
from benchmarks.harness.flops import flops
from benchmarks.harness.models_under_test import Subject, shapes_of, subject
from command import Parser
from service.host import cpus
from service.runtimes.auto import Choice, load
from service.runtimes.openvino import OpenVinoRuntime, compiled

# M × K × N: the products of BERT-base's feed-forward layers, 8 texts of 128 tokens at once and 16.
PRODUCTS = ((1024, 768, 3072), (1024, 3072, 768), (2048, 768, 3072))
ASKED = {"f32": None, "bf16": 0.85, "i8": 0.70}

Call = Callable[[], object]


def main(arguments: Sequence[str]) -> int:
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
    given = parser.parse_args(arguments)
    found = measure(given.size, rounds=5 if given.short else 15, shapes=shapes_of(given.short))
    print(markdown(found))
    if given.out is not None:
        write(given.out, "python -m benchmarks roofline", [found])
    return 0


def measure(size: str, rounds: int, shapes: Sequence[tuple[int, int]]) -> Findings:
    """(variants × shapes) shares of the peak, of `rounds` rounds each."""
    threads = cpus.usable()
    torch.set_num_threads(threads)
    measured = subject(size)
    config = json.loads((measured.checkpoint / "config.json").read_text())
    rows, profiles, targets, values = [], [], [], {}
    for name in measured.variants:
        precision = measured.artifact.manifest.variants[name].precision
        peaks = products(precision, threads)
        engine = load(measured.artifact, Choice(name, "openvino", "benchmark"), threads)
        assert isinstance(engine, OpenVinoRuntime)
        profiles += _profile(measured, name, engine.rest or engine.precision, threads)
        batches = {
            shape: _batch(engine, measured.artifact.manifest.inputs, *shape) for shape in shapes
        }
        times = np.zeros((rounds + 1, len(peaks) + len(shapes)))
        for number in range(rounds + 1):
            for i, call in enumerate([*(call for call, _ in peaks), *batches.values()]):
                times[number, i] = _seconds(call)
        # The first round fills caches and chooses kernels.
        times = times[1:]
        peak = np.max(
            [work / times[:, i] for i, (_, work) in enumerate(peaks)], axis=0
        )  # (rounds) op/s
        for i, shape in enumerate(shapes):
            rate = flops(measured.artifact, config, *shape) / times[:, len(peaks) + i]
            share = rate / peak
            values[f"{name} {shape[0]}x{shape[1]}"] = {"ops": rate.tolist(), "peak": peak.tolist()}
            rows.append(
                [
                    name,
                    f"{shape[0]} × {shape[1]}",
                    f"{np.median(times[:, len(peaks) + i]) * 1000:.1f}",
                    f"{np.median(rate) / 1e9:,.0f}",
                    f"{np.median(peak) / 1e9:,.0f}",
                    spread(share),
                ]
            )
            asked = ASKED[precision]
            if shape == (8, 128) and asked is not None:
                targets.append(
                    Target(
                        f"{name}: engine by peak at 8 × 128",
                        f"≥ {asked:.2f}",
                        f"{np.median(share):.2f}",
                        bool(np.median(share) >= asked),
                    )
                )
    for absent in ASKED.keys() - cpus.native_precisions():
        targets.append(
            Target(
                f"{absent}: engine by peak at 8 × 128",
                f"≥ {ASKED[absent]:.2f}",
                "this processor has no instructions for it",
                None,
            )
        )
    return Findings(
        "roofline",
        f"What share of the processor's matrix products does the engine reach ({size}, {threads}"
        " thread(s))?",
        [
            Table(
                "",
                (
                    "variant",
                    "batch × length",
                    "ms",
                    "engine, Gop/s",
                    "peak, Gop/s",
                    "engine by peak",
                ),
                rows,
                "Operations are those of the model's matrices, two for a multiplication and"
                " addition; normalisation, softmax and GELU are not counted, their time is.",
            ),
            Table(
                "Where a batch of 8 × 128 spends its time",
                ("variant", "kind of operation", "kernel", "how many", "of the time"),
                profiles,
                "As OpenVINO counts it (PERF_COUNT), the median of 10 batches; what takes under 1 %"
                " is left out. GELU, additions and quantisation are mostly in the products' own"
                " kernels.",
            ),
        ],
        targets,
        values,
    )


def _profile(measured: Subject, variant: str, precision: str, threads: int) -> list[list[str]]:
    """Kinds of operations and what share of a batch's time each takes, largest first."""
    graph = measured.artifact.path(measured.artifact.manifest.variants[variant].files[0])
    model = compiled(graph, precision, threads, {"PERF_COUNT": True})
    request, draw = model.create_infer_request(), np.random.default_rng(0)
    given = {
        port.any_name: (
            draw.integers(5, 1000, (8, 128))
            if port.any_name == "input_ids"
            else np.ones((8, 128), np.int64)
        )
        for port in model.inputs
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    counts: dict[tuple[str, str], int] = {}
    for number in range(12):
        request.infer(given)
        if number < 2:
            continue
        own: dict[tuple[str, str], float] = {}
        counts = {}
        for one in request.profiling_info:
            kind = (one.node_type, one.exec_type)
            own[kind] = own.get(kind, 0.0) + one.real_time.total_seconds()
            counts[kind] = counts.get(kind, 0) + (one.real_time.total_seconds() > 0)
        for kind, taken in own.items():
            seconds.setdefault(kind, []).append(taken)
    medians = {kind: float(np.median(taken)) for kind, taken in seconds.items()}
    whole = sum(medians.values())
    ordered = sorted(medians.items(), key=lambda item: -item[1])
    return [
        [variant, kind, kernel, str(counts[kind, kernel]), f"{taken / whole:.0%}"]
        for (kind, kernel), taken in ordered
        if taken >= 0.01 * whole
    ]


def products(precision: str, threads: int) -> list[tuple[Call, int]]:
    """Large matrix products in a precision, each with its operations."""
    found: list[tuple[Call, int]] = []
    for m, k, n in PRODUCTS:
        work = 2 * m * k * n
        if precision == "i8":
            found += [
                (call, work)
                for call in (_torch_int8(m, k, n), _openvino_product(m, k, n, "i8", threads))
            ]
        else:
            dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
            left, right, out = (
                torch.randn(m, k, dtype=dtype),
                torch.randn(k, n, dtype=dtype),
                torch.empty(m, n, dtype=dtype),
            )
            found.append((partial(torch.mm, left, right, out=out), work))
            found.append((_openvino_product(m, k, n, precision, threads), work))
    return found


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
    """The same product as a model of one layer, its input rounded to 8 bits for `i8`."""
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


def _batch(engine: OpenVinoRuntime, inputs: Sequence[str], batch: int, length: int) -> Call:
    draw = np.random.default_rng(0)
    arrays = {
        "input_ids": draw.integers(5, 1000, (batch, length)),
        "attention_mask": np.ones((batch, length), np.int64),
        "token_type_ids": np.zeros((batch, length), np.int64),
    }
    given = {name: arrays[name] for name in inputs}
    return lambda: engine.start(given)()


def _seconds(call: Call) -> float:
    """The shortest of three, for what a neighbour adds is not the engine's."""
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
