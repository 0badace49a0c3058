"""
Does ConvBERT keep its promise: is its engine time by BERT's the ratio of their operations?

    python -m benchmarks convbert [--short] [--out FILE]

Three graphs of one size run in turns: BERT, ConvBERT as transformers exports it, and ConvBERT as
this project exports it. transformers copies the values k times and convolves padding; ours uses a
band matrix and is padding-invariant. Weights are random, fp32.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvBertConfig,
    ConvBertForSequenceClassification,
)

from benchmarks.harness.findings import Findings, Table, at_most, markdown, spread, write
from benchmarks.harness.models_under_test import batch_shapes
from command import Parser
from export.graph.attention import with_export_attention
from export.graph.onnx_file import export_onnx
from service.host import cpus
from service.runtimes.openvino import OpenVinoRuntime

# As published (arXiv 2008.02496): layers, hidden size, heads, feed-forward size.
SIZES = {"small": (12, 256, 4, 1024), "base": (12, 768, 12, 3072), "tiny": (2, 32, 2, 64)}
KERNEL, RATIO = 9, 2
ALLOWED = 1.15
"""Largest ratio of the measured time ratio to the FLOPs ratio."""


def main(arguments: Sequence[str]) -> int:
    """Measure ConvBERT against BERT and print the table."""
    parser = Parser(
        prog="python -m benchmarks convbert",
        description="Measure ConvBERT's engine time by BERT's.",
    )
    parser.add_argument("--short", action="store_true", help="fewer rounds and shapes")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=("small", "base"))
    parser.add_argument("--out", type=Path, help="write a Markdown page and its numbers as JSON")
    options = parser.parse_args(arguments)
    findings = measure(
        options.sizes, batch_shapes(options.short), rounds=5 if options.short else 15
    )
    print(markdown(findings))
    if options.out is not None:
        write(options.out, "python -m benchmarks convbert", [findings])
    return 0


def measure(sizes: Sequence[str], shapes: Sequence[tuple[int, int]], rounds: int) -> Findings:
    """Return the time ratios of each size at each shape (texts, tokens)."""
    rows, targets, values = [], [], {}
    for size in sizes:
        engines = graphs(size)
        for batch, length in shapes:
            times = seconds(engines, batch, length, rounds)
            plain, ours = times["transformers"] / times["bert"], times["ours"] / times["bert"]
            promised = flops_ratio(size, length)
            rows.append(
                [
                    size,
                    f"{batch} × {length}",
                    f"{np.median(times['bert']) * 1000:.1f}",
                    f"{promised:.2f}",
                    spread(plain),
                    spread(ours),
                    f"{np.median(ours) / promised:.2f}",
                ]
            )
            targets.append(
                at_most(
                    f"{size}, {batch} × {length}: time ratio by FLOPs ratio",
                    float(np.median(ours)) / promised,
                    ALLOWED,
                )
            )
            values[f"{size} {batch}x{length}"] = {
                name: rounds_s.tolist() for name, rounds_s in times.items()
            }
    columns = (
        "size",
        "batch × length",
        "BERT, ms",
        "FLOPs by BERT's",
        "transformers' export by BERT",
        "ours by BERT",
        "ours by its FLOPs ratio",
    )
    note = (
        "FLOPs: of the layers' matrices, attention and the convolutions, counted from the paper's"
        " formulas. The band's zeros are not counted; their time is."
    )
    return Findings(
        "convbert",
        f"ConvBERT's engine time by that of a BERT of its size (fp32, {cpus.usable()} thread(s)).",
        [Table("", columns, rows, note)],
        targets,
        values,
    )


def flops_ratio(size: str, length: int) -> float:
    """Return the FLOPs of ConvBERT's layers by BERT's, for one text of `length` tokens.

    A multiply-add counts as two.
    """
    _, hidden, heads, wide = SIZES[size]
    half = hidden // RATIO
    feed_forward = 2 * hidden * wide
    bert = length * (4 * hidden * hidden + feed_forward) + 2 * length * length * hidden
    # Query, key, value, the convolution's values and the pointwise half of its keys; then the
    # depthwise half, kernels and sums.
    mixed = 5 * hidden * half + KERNEL * hidden + half * (heads // RATIO) * KERNEL + KERNEL * half
    convbert = length * (mixed + hidden * hidden + feed_forward) + 2 * length * length * half
    return convbert / bert


def graphs(size: str) -> dict[str, OpenVinoRuntime]:
    """Return the three graphs of a size, each loaded into an engine."""
    layers, hidden, heads, wide = SIZES[size]
    config: dict[str, Any] = {
        "vocab_size": 1000,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": wide,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(**config, attn_implementation="eager")).eval()
    conv = ConvBertForSequenceClassification(
        ConvBertConfig(**config, embedding_size=hidden, conv_kernel_size=KERNEL, head_ratio=RATIO)
    ).eval()
    engines = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (
            ("bert", bert),
            ("transformers", conv),
            ("ours", with_export_attention(conv)),
        ):
            path = Path(folder) / f"{name}.onnx"
            export_onnx(model, path, ["input_ids", "attention_mask", "token_type_ids"])
            engines[name] = OpenVinoRuntime(path, "f32", cpus.usable())
    return engines


def seconds(
    engines: Mapping[str, OpenVinoRuntime], batch: int, length: int, rounds: int
) -> dict[str, np.ndarray]:
    """Return the seconds (rounds) of one batch on every engine; the shortest of three runs each.

    The engines run in turns, every other round backwards. The first round is a warm-up and is
    dropped.
    """
    inputs = {
        "input_ids": np.full((batch, length), 7),
        "attention_mask": np.ones((batch, length), np.int64),
        "token_type_ids": np.zeros((batch, length), np.int64),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            best = np.inf
            for _ in range(3):
                began = time.perf_counter()
                engines[name].start(inputs)()
                best = min(best, time.perf_counter() - began)
            times[name].append(best)
    return {name: np.array(values[1:]) for name, values in times.items()}
