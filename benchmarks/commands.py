"""
The benchmarks, by name: each is a module with a main of its own.

    python -m benchmarks all --short                       the seven that follow, in ten minutes
    python -m benchmarks roofline                          the engine by what the processor can
                                                           multiply
    python -m benchmarks startup                           from a process' start to its first
                                                           answer, and its memory
    python -m benchmarks memory                            what it grows by once every shape was met
    python -m benchmarks batching                          the batcher's choices beside others
    python -m benchmarks convbert                          ConvBERT's engine time by BERT's
    python -m benchmarks overhead                          what HTTP, queue and answer add to the
                                                           engine
    python -m benchmarks peers                             ours beside other servers of the same
                                                           classifier

    python -m benchmarks gpu                               all of it on an NVIDIA GPU, in stages

    python -m benchmarks families                          which families do BERT's work, and which
                                                           do not
    python -m benchmarks minilm --data DIR                 what int8 does to a real checkpoint, in 8
                                                           and in 7 bits
    python -m benchmarks judge                             is the judge right as often as it says?
    python -m benchmarks delays PLAN                       are delays of known size, added by a
                                                           proxy, read as what they are?
    python -m benchmarks random_twins artifacts/random-base   two classifiers of BERT-base's size,
                                                              exported: twins for a proof
    python -m benchmarks training --data DIR               pretraining steps by their matrix
                                                           products, and designs by none
    python -m benchmarks subnormals artifacts/bert ...     the slow numbers of an artifact, in its
                                                           weights and on real texts
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from command import BadUsage, Parser

BENCHMARKS = {
    "all": "every benchmark of the CPU service, one after the other",
    "roofline": "how much of what the processor can multiply does the engine reach?",
    "startup": "from a process' start to its first answer, and what memory that takes",
    "memory": "does memory stay where it is, once every shape was met?",
    "batching": "padding, shapes, streams and waiting: the batcher's choices beside others",
    "convbert": "ConvBERT's engine time by BERT's, as we export it and as transformers does",
    "overhead": "what HTTP, the queue and the answer add to the engine",
    "peers": (
        "ours beside Infinity, transformers, optimum, OpenVINO and LitServe, on the same processors"
    ),
    "gpu": (
        "the service on an NVIDIA GPU: numerics, latency, throughput, PyTorch beside it, the twins'"
        " proof"
    ),
    "minilm": (
        "what int8 does to a real checkpoint, a MiniLM with a head trained here: its gate and its"
        " speed"
    ),
    "judge": (
        "is the judge right as often as it says? simulated runs, real noise, and how long twelve"
        " million rows take"
    ),
    "delays": "delays from outside, by a proxy: are they read as what they are?",
    "families": "compare every family of encoders with BERT, each with the outcome expected of it",
    "random_twins": (
        "export two classifiers of BERT-base's size with random weights, twins for a proof at that"
        " size"
    ),
    "training": (
        "pretraining steps, by what their matrix products alone take and by those of a model"
        " without a decoder"
    ),
    "subnormals": (
        "count the subnormal numbers in artifacts' weights and in what they compute of real texts"
    ),
}

OF_THE_PROOF = ("judge", "delays", "random_twins")


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks",
        usage="python -m benchmarks NAME ...",
        add_help=False,
        description="; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items()),
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    name, *rest = arguments
    if name not in BENCHMARKS:
        raise BadUsage(f"Unknown benchmark {name!r}; known are {', '.join(BENCHMARKS)}.")
    package = "benchmarks.proving" if name in OF_THE_PROOF else "benchmarks"
    code: int = importlib.import_module(f"{package}.{name}").main(rest)
    return code
