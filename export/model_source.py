"""
Where a model's graph and its reference answers come from: torch, or a graph that was exported
elsewhere.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from command import BadUsage
from export.checkpoint.config import labels_tokens, read_config
from export.checkpoint.graph_reference import GraphReference
from export.checkpoint.loading import Checkpoint
from export.checkpoint.reference import Reference, load_model
from export.distillation import Distillation
from export.graph.imported_graph import ImportedModel, read_imported
from export.manifest import Signature


def read_imported_model(checkpoint: Checkpoint) -> ImportedModel | None:
    """Return the model of a graph that was exported elsewhere; None for weights of torch."""
    if checkpoint.graph is None:
        return None
    config = read_config(checkpoint.directory, checkpoint.config)
    return read_imported(checkpoint.graph, config, labels_tokens(checkpoint.config))


def choose_reference(
    checkpoint: Checkpoint,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    signature: Signature,
    keep_decoder: bool,
) -> Reference:
    """Return what the variants are compared with."""
    if isinstance(model, ImportedModel):
        return GraphReference(
            model.graph,
            tokenizer,
            signature.max_tokens,
            model.embedding_rows,
            signature.task == "token_labels",
        )
    # transformers cannot load a kept decoder, so such a model is checked against itself.
    original = model if keep_decoder else load_model(checkpoint)
    return Reference(original, tokenizer, signature.max_tokens)


def count_parameters(model: Any) -> int:
    """Return the number of a model's weights."""
    if isinstance(model, ImportedModel):
        return model.parameters
    return sum(parameter.numel() for parameter in model.parameters())


def check_options_of_graph(
    checkpoint: Checkpoint, keep_decoder: bool, distillation: Distillation | None
) -> None:
    """Raise BadUsage for options that need the weights of a torch model."""
    for option, is_given in (("--keep-decoder", keep_decoder), ("--distill", distillation)):
        if is_given:
            raise BadUsage(
                f"{option} needs a torch model, and {checkpoint.directory} holds an ONNX graph;"
                " leave it out."
            )
