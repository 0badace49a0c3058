"""
The graphs for NVIDIA GPUs: in 16 bits, and for ONNX Runtime's own kernels with every layer fused.

A fused layer is one attention, which reads a text's length instead of a mask over its scores, and
so pads on the right only; two sums with their layer normalisation in one; one bias with its gelu in
one. What a family's graph does not match is left as it was, silently, so the fused operators are
counted.
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

from command import Unavailable

# The families whose every layer becomes the fused operators.
FUSED = ("bert", "electra", "roberta", "xlm-roberta", "camembert", "distilbert")
_EMBEDDINGS_FUSED = ("bert", "electra", "distilbert")


class NotFused(Exception):
    """A layer of a graph was not recognised."""


def write_fused(source: Path, target: Path, config: Any) -> None:
    """The graph in fp16 with every layer fused and int32 inputs; NotFused if a layer was not
    recognised.
    """
    optimizer = _onnxruntime().optimizer
    with _silence():
        # Only the pattern matching, for every level beyond lets a session of this host's CPU change
        # the graph.
        model = optimizer.optimize_model(
            str(source), model_type="bert", num_heads=0, hidden_size=0, opt_level=0
        )
        model.change_graph_inputs_to_int32()
        model.convert_float_to_float16(keep_io_types=True)
    found = Counter(node.op_type for node in model.model.graph.node)
    for operator, due in due_operators(config).items():
        if found[operator] != due:
            raise NotFused(
                f"{found[operator]} {operator} in a graph of {config.num_hidden_layers} layers,"
                f" where {due} are due"
            )
    model.save_model_to_file(str(target))


def due_operators(config: Any) -> dict[str, int]:
    """How many fused operators of each kind a model of a family in FUSED must have."""
    layers = config.num_hidden_layers
    due = {"Attention": layers, "SkipLayerNormalization": 2 * layers}
    if (
        getattr(config, "hidden_act", None) == "gelu"
        or getattr(config, "activation", None) == "gelu"
    ):
        due["BiasGelu"] = layers
    return due | ({"EmbedLayerNormalization": 1} if config.model_type in _EMBEDDINGS_FUSED else {})


def write_half(source: Path, target: Path) -> None:
    """The same graph with weights and arithmetic in fp16; its logits are fp32."""
    onnx_model = _onnxruntime().onnx_model
    import onnx

    with _silence():
        model = onnx_model.OnnxModel(onnx.load(source))
        model.convert_float_to_float16(keep_io_types=True)
        model.save_model_to_file(str(target))


def _onnxruntime() -> Any:
    try:
        from onnxruntime import transformers

        # They are attributes of it then.
        from onnxruntime.transformers import onnx_model, optimizer  # noqa: F401
    except ImportError:
        raise Unavailable(
            "Variants for GPUs are made by onnxruntime, which is not installed; pip install"
            " 'drbert-serve[portable]', or 'drbert-serve[gpu]' where there is a GPU."
        ) from None
    return transformers


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what the converter prints of shapes it cannot infer and of constants it rounds:
    verification shows whether one mattered.
    """
    loggers = [
        logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if "onnx" in name
    ]
    before = [(logger, logger.level) for logger in [*loggers, logging.getLogger()]]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger, _ in before:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in before:
                logger.setLevel(level)
