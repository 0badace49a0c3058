"""
The benchmarks by name; each is a module with a `main` of its own.

    python -m benchmarks all --short             the next eight, in twelve minutes
    python -m benchmarks roofline                the engine's rate by the processor's peak
    python -m benchmarks startup                 time and memory from start to first answer
    python -m benchmarks memory                  growth of memory after every shape has run
    python -m benchmarks batching                the batcher's choices and their alternatives
    python -m benchmarks convbert                ConvBERT's engine time by BERT's
    python -m benchmarks overhead                what HTTP, queue and answer add to the engine
    python -m benchmarks peers                   comparison with other servers of one classifier
    python -m benchmarks rerank                  the same of a reranker

    python -m benchmarks fleet                   many pods, by a simulation of one service

    python -m benchmarks gpu                     all of it on an NVIDIA GPU, in stages

    python -m benchmarks families                which model families do the same work as BERT
    python -m benchmarks minilm --data DIR       int8 on a real checkpoint, with 8 and 7 bits
    python -m benchmarks judge                   how often the judge errs
    python -m benchmarks delays PLAN             whether the proof detects delays of a proxy
    python -m benchmarks neighbour PLAN          how many runs are valid beside a busy process
    python -m benchmarks random_twins ARTIFACTS  export two random classifiers of BERT-base's size
    python -m benchmarks training --data DIR     pretraining steps by their matrix products
    python -m benchmarks subnormals ARTIFACT...  subnormal numbers in weights and activations
    python -m benchmarks last_layer ARTIFACT     the narrowed last layer by the whole one
    python -m benchmarks engines ARTIFACT        the variants by each engine that can run them
    python -m benchmarks heads                   one model with three heads by three models
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from command import BadUsage, Parser

BENCHMARKS = {
    "all": "every benchmark of the CPU service, one after the other",
    "roofline": "what share of the processor's matrix products does the engine reach?",
    "startup": "time and memory from a process' start to its first answer",
    "memory": "does memory stay constant after every shape has run once?",
    "batching": "padding, packing, shapes, streams, waiting: the batcher's alternatives",
    "convbert": "ConvBERT's engine time by BERT's, as exported here and by transformers",
    "overhead": "what HTTP, the queue and the answer add to the engine",
    "peers": (
        "comparison with Infinity, transformers, optimum, OpenVINO and LitServe on the same"
        " processors"
    ),
    "fleet": "how do requests reach many pods best? a simulation, fitted to one service",
    "rerank": "comparison with Infinity and sentence-transformers, of a reranker",
    "gpu": (
        "the service on an NVIDIA GPU: numerics, latency, throughput, PyTorch, and the twins' proof"
    ),
    "minilm": (
        "what int8 does to a real checkpoint, a MiniLM with a head trained here: its gate and its"
        " speed"
    ),
    "judge": (
        "how often does the judge err? simulated runs, real noise, and the time for twelve million"
        " rows"
    ),
    "delays": "does the proof detect delays that a proxy adds from outside?",
    "neighbour": "how often is a run of the proof valid while another process is busy?",
    "families": "compare every model family with BERT, each with its expected outcome",
    "random_twins": (
        "export two classifiers of BERT-base's size with random weights, twins for a proof at that"
        " size"
    ),
    "training": (
        "pretraining steps by their matrix products alone, and by those of a model without a"
        " decoder"
    ),
    "subnormals": "count subnormal numbers in artifacts' weights and in their activations",
    "engines": "which engine computes a batch fastest on this processor?",
    "heads": "what it saves to compute classifiers of one encoder as one model",
    "last_layer": "what it saves to compute the last layer for first tokens only",
}

FOLDERS = {
    "benchmarks.peers": ("rerank",),
    "benchmarks.proving": ("judge", "delays", "neighbour", "random_twins"),
    "benchmarks.graphs": ("engines", "heads", "last_layer", "subnormals"),
}
"""Benchmarks whose modules are in a folder of their own."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark named first with the remaining arguments; return its exit code."""
    parser = Parser(
        prog="python -m benchmarks",
        usage="python -m benchmarks NAME ...",
        add_help=False,
        description="; ".join(f"{name}: {summary}" for name, summary in BENCHMARKS.items()),
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    if arguments[0] == "--version":
        parser.parse_args(arguments)
    name, *rest = arguments
    if name not in BENCHMARKS:
        raise BadUsage(f"Unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}.")
    package = next((folder for folder, names in FOLDERS.items() if name in names), "benchmarks")
    code: int = importlib.import_module(f"{package}.{name}").main(rest)
    return code
