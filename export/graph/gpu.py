"""
Writes graphs for NVIDIA GPUs: in fp16, and for ONNX Runtime with every layer fused.

A fused layer is three kinds of operator. One attention reads a text's length instead of a mask over
its scores, and therefore supports padding on the right only. Two operators each hold a sum with its
layer normalisation, and one holds a bias with its gelu. onnxruntime leaves a layer that it does not
recognise as it is and reports nothing, so the fused operators are counted.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command import Unavailable, how_to_install
from export.graph.narrowed import narrow

FUSED = ("bert", "electra", "roberta", "xlm-roberta", "camembert", "distilbert")
"""Families of which every layer is fused."""
_EMBEDDINGS_FUSED = ("bert", "electra", "distilbert")


class NotFused(Exception):
    """onnxruntime did not recognise a layer of a graph."""


def write_fused(source: Path, target: Path, config: Any) -> None:
    """Write the graph in fp16, with every layer fused and int32 inputs.

    Raises NotFused, and writes nothing, if a layer was not recognised.
    """
    optimizer = _onnxruntime().optimizer
    with _silence():
        # opt_level 0 only matches patterns: from level 1 on, a session on this host's CPU changes
        # the graph too.
        model = optimizer.optimize_model(
            str(source), model_type="bert", num_heads=0, hidden_size=0, opt_level=0
        )
        model.change_graph_inputs_to_int32()
        model.convert_float_to_float16(keep_io_types=True)
    counts = Counter(node.op_type for node in model.model.graph.node)
    for operator, expected in expected_operators(config).items():
        if counts[operator] != expected:
            raise NotFused(
                f"{counts[operator]} {operator} operators instead of {expected} in a graph of"
                f" {config.num_hidden_layers} layers"
            )
    model.topological_sort()
    narrow(model.model)
    model.save_model_to_file(str(target))


def expected_operators(config: Any) -> dict[str, int]:
    """Return how many fused operators of each kind a model of a family in FUSED must have."""
    layers = config.num_hidden_layers
    counts = {"Attention": layers, "SkipLayerNormalization": 2 * layers}
    if "gelu" in (getattr(config, "hidden_act", None), getattr(config, "activation", None)):
        counts["BiasGelu"] = layers
    if config.model_type in _EMBEDDINGS_FUSED:
        counts["EmbedLayerNormalization"] = 1
    return counts


def write_half(source: Path, target: Path) -> None:
    """Write the graph with weights and arithmetic in fp16; its logits stay fp32."""
    onnx_model = _onnxruntime().onnx_model
    import onnx

    with _silence():
        graph = onnx.load(source)
        narrow(graph)
        model = onnx_model.OnnxModel(graph)
        model.convert_float_to_float16(keep_io_types=True)
        model.save_model_to_file(str(target))


def _onnxruntime() -> Any:
    try:
        from onnxruntime import transformers

        # Importing them makes them attributes of the package.
        from onnxruntime.transformers import onnx_model, optimizer  # noqa: F401
    except ImportError:
        raise Unavailable(
            "onnxruntime, which builds the variants for GPUs, is not installed;"
            f" {how_to_install('portable')}, or with [gpu] on a host with a GPU."
        ) from None
    return transformers


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the converter, which reports every shape it cannot infer and constant it rounds.

    Verification shows whether one of them mattered.
    """
    loggers = [
        logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if "onnx" in name
    ]
    levels = [(logger, logger.level) for logger in [*loggers, logging.getLogger()]]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)
